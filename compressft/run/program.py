"""Train the stages of a recipe one after the other, each resumable, each settled and checked before the next."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from torch import nn

from compressft.data.splits import Splits
from compressft.errors import UserError
from compressft.export.flow import sample_batch
from compressft.export.refuse import refuse_attention, refuse_lengths, refuse_model
from compressft.model.anatomy import positions
from compressft.model.count import count
from compressft.model.flops import FLOPS_LENGTH, flops
from compressft.model.load import answers_others, load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.shrink import shapes
from compressft.model.source import load_tokenizer, resolve
from compressft.recipe.recipe import Recipe
from compressft.run.costs import known_costs
from compressft.run.feed import StageRows, row_lengths
from compressft.run.folder import RunFolder
from compressft.run.stage import train_stage
from compressft.tasks.task import Task
from compressft.utils import ranks
from compressft.utils.collector import importing
from compressft.utils.foreign import load_config
from compressft.utils.memory import give_back
from compressft.utils.phases import SECONDS, keep, phase


def train_stages(
    recipe: Recipe, folder: RunFolder, task: Task, splits: Splits, info: dict[str, Any], console: Console
) -> tuple[nn.Module, Task, list[dict[str, Any]]]:
    """Train all stages one after the other, each from the weights of the one before.

    Args:
        info: recorded in each stage's model folder.

    Returns:
        the trained model on the CPU, the task with the tokenizer that it now has, and one record per stage.
    """
    with phase("loading"):
        model, rows, costs, base = start(recipe, folder, task, splits, console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records: list[dict[str, Any]] = []
    for stage in recipe.stages:
        record = folder.finished(stage.name)
        if record is None:
            offset = sum(r["steps"] for r in records)
            record = train_stage(stage, model.to(device), recipe, folder, rows, offset, console, costs)
            record["base"] = base
            if ranks.first():
                save_compressed(model, rows.task.tokenizer, folder.stage(stage.name), {**info, "stage": record})
                keep(folder.root / SECONDS)
            ranks.wait()
        else:
            with phase("loading"):
                model = load_compressed(folder.stage(stage.name))
            tokenizer = load_tokenizer(str(folder.stage(stage.name)))
            if len(tokenizer) != len(rows.task.tokenizer):
                rows.retokenise(tokenizer)
        records.append(record)
        give_back()
    return model.cpu().eval(), rows.task, records


def start(
    recipe: Recipe, folder: RunFolder, task: Task, splits: Splits, console: Console
) -> tuple[Any, StageRows, dict[str, Any], dict[str, Any]]:
    """The model that training begins with, its rows, what parts of it cost, and what a report says of it.

    Raises:
        UserError: rows, recipe or disk do not go with it; nothing has been trained yet.
    """
    with importing():
        from transformers import set_seed

        # With the model's own module.
        set_seed(recipe.stages[0].train.seed)
        model = load_model(recipe.model, task.auto_class, new_head=True, **task.model_arguments())
    if answers_others(load_config(resolve(recipe.model)), task.model_arguments()):
        console.print(f"{recipe.model}: its head is for other labels; a new one is trained", soft_wrap=True)
    check_vocabulary(recipe.model, model, task.tokenizer)
    folder.check_space(sum(p.numel() * p.element_size() for p in model.parameters()))
    base = {"shapes": shapes(model), "parameters": count(model)["total"], "flops": flops(model, FLOPS_LENGTH)}
    rows = StageRows(task, splits)
    check_positions(recipe, model, rows)
    refuse_model(recipe, model)
    refuse_lengths(recipe, model, lambda: row_lengths(rows))
    refuse_attention(recipe, model, sample_batch(task, {"train": rows.train}))
    costs = known_costs(recipe, folder, model, rows, console)
    return model, rows, costs, base


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose pieces have no row in the model's table.

    Raises:
        UserError: it knows more than the model.
    """
    table = model.get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        raise UserError(
            f"model: the tokenizer of {name!r} knows {len(tokenizer)} pieces, the model {table.num_embeddings}; "
            "resize its embeddings and save it again"
        )


@phase("loading")
def check_positions(recipe: Recipe, model: nn.Module, rows: StageRows) -> None:
    """Refuse rows, and shapes to measure, that are longer than the model's table of positions.

    Raises:
        UserError: what is too long, and for how many.
    """
    places = positions(model)
    if places is None:
        return
    longest = max(row_lengths(rows), default=0)
    if longest > places:
        raise UserError(
            f"data.max_length: a row has {longest} tokens, the model {places} positions; set it to {places} or less"
        )
    shape = max(recipe.export.latency_shapes, key=lambda shape: shape[1], default=(0, 0))
    if recipe.export.enabled and shape[1] > places:
        raise UserError(
            f"export.latency_shapes: {shape[0]}x{shape[1]} has more tokens than the model's {places} positions; "
            f"give shapes up to {places}, such as [[1, {places}]]"
        )
