"""Train the stages of a recipe one after the other, each resumable, each settled and checked before the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressft.errors import UserError
from compressft.export.flow import sample_batch
from compressft.export.refuse import refuse_attention, refuse_lengths, refuse_model
from compressft.model.anatomy import positions
from compressft.model.count import count
from compressft.model.flops import FLOPS_LENGTH, flops
from compressft.model.heads import with_head
from compressft.model.load import answers_others
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.shrink import shapes
from compressft.model.source import load_tokenizer, resolve
from compressft.recipe.program import Stage
from compressft.recipe.recipe import Recipe
from compressft.run.costs import known_costs
from compressft.run.donors import donor, fresh, kept_heads
from compressft.run.feed import FeedRows, Feeds, model_info
from compressft.run.mixed import take_heads
from compressft.run.records import Begun, Run, Spent, Trained
from compressft.run.select import make_selections
from compressft.run.stage import train_stage
from compressft.utils import ranks
from compressft.utils.foreign import load_config
from compressft.utils.memory import give_back
from compressft.utils.phases import SECONDS, keep, phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_stages(run: Run, feeds: Feeds) -> Trained:
    """Train all stages one after the other, each from the weights of the one before, under its own task's head."""
    recipe, folder = run.recipe, run.folder
    with phase("loading"):
        begun = start(run, feeds)
    model, head = begun.model, feeds.of(recipe.stages[0]).task.key
    # The loop's variable is the one that holds it from here on.
    begun.model = None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records: list[dict[str, Any]] = []
    for stage in recipe.stages:
        record = folder.finished(stage.name)
        make_selections(run, feeds, stage)
        if record is None:
            rows = feeds.of(stage)
            if stage.start is not None:
                with phase("loading"):
                    model, head = begin_at(run, feeds, stage)
            if rows.task.key != head:
                with phase("loading"):
                    model = with_head(model, donor(run, feeds, stage, rows.task), f"stages.{stage.name}")
            done = sum(r["steps"] for r in records)
            record = {**train_stage(run, stage, model.to(device), feeds, Spent(done, begun.costs)), "base": begun.base}
            heads = take_heads(model)
            if ranks.first():
                info = {**model_info(recipe, rows, folder.recipe_hash), "stage": record}
                save_compressed(model, rows.task.tokenizer, folder.stage(stage.name), info, kept_heads(heads))
                keep(folder.root / SECONDS)
            ranks.wait()
        else:
            with phase("loading"):
                model = load_compressed(folder.stage(stage.name))
            follow_tokenizer(feeds, str(folder.stage(stage.name)))
        head = feeds.of(stage).task.key
        records.append(record)
        give_back()
    return Trained(model.cpu().eval(), records)


def begin_at(run: Run, feeds: Feeds, stage: Stage) -> tuple[Any, Any]:
    """The model that a stage's `start` names, and the task and labels of its head."""
    if stage.start == "base":
        follow_tokenizer(feeds, run.recipe.model)
        task = feeds.of(stage).task
        return fresh(run.recipe, task, stage.train.seed), task.key
    named = next(one for one in run.recipe.stages if one.name == stage.start)
    follow_tokenizer(feeds, str(run.folder.stage(named.name)))
    return load_compressed(run.folder.stage(named.name)), feeds.of(named).task.key


def follow_tokenizer(feeds: Feeds, source: str) -> None:
    """Go on with a model's own tokenizer, where a pass has cut one."""
    tokenizer = load_tokenizer(source)
    if len(tokenizer) != len(feeds.all[0].task.tokenizer):
        feeds.retokenise(tokenizer)


def start(run: Run, feeds: Feeds) -> Begun:
    """What training begins with.

    Raises:
        UserError: rows, recipe or disk do not go with the model; nothing has been trained yet.
    """
    recipe, first, shipped = run.recipe, feeds.of(run.recipe.stages[0]), feeds.shipped
    model: Any = fresh(recipe, first.task, recipe.stages[0].train.seed)
    if answers_others(load_config(resolve(recipe.model)), first.task.model_arguments()):
        run.console.print(f"{recipe.model}: its head is for other labels; a new one is trained", soft_wrap=True)
    check_vocabulary(recipe.model, model, first.task.tokenizer)
    run.folder.check_space(sum(p.numel() * p.element_size() for p in model.parameters()))
    base = {"shapes": shapes(model), "parameters": count(model)["total"], "flops": flops(model, FLOPS_LENGTH)}
    for rows in feeds.sources:
        check_positions(model, rows)
        # Whether they can be scored shows in the first one: columns are those of all.
        rows.task.truth(rows.validation[:1])
    refuse_shapes(recipe, model)
    refuse_model(recipe, model)
    refuse_lengths(recipe, model, lambda: shipped.lengths.tolist())
    refuse_attention(recipe, model, sample_batch(shipped.task, {"train": shipped.train}))
    return Begun(model, known_costs(run, model, feeds), base)


def check_vocabulary(name: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
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
def check_positions(model: nn.Module, rows: FeedRows) -> None:
    """Refuse rows that are longer than the model's table of positions.

    Raises:
        UserError: how long the longest one is.
    """
    places = positions(model)
    if places is None:
        return
    longest = max(rows.lengths.tolist(), default=0)
    if longest > places:
        raise UserError(
            f"{rows.feed.field}.max_length: a row has {longest} tokens, the model {places} positions; "
            f"set it to {places} or less"
        )


def refuse_shapes(recipe: Recipe, model: nn.Module) -> None:
    """Refuse shapes to measure that are longer than the model's table of positions.

    Raises:
        UserError: which one is.
    """
    places = positions(model)
    shape = max(recipe.export.latency_shapes, key=lambda shape: shape[1], default=(0, 0))
    if places is not None and recipe.export.enabled and shape[1] > places:
        raise UserError(
            f"export.latency_shapes: {shape[0]}x{shape[1]} has more tokens than the model's {places} positions; "
            f"give shapes up to {places}, such as [[1, {places}]]"
        )
