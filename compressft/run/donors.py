"""Models that give a stage its heads: an earlier stage's of the same task and labels, else the base's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from compressft.model.heads import over
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed
from compressft.model.saved.folders import read_manifest
from compressft.recipe.program import Stage
from compressft.recipe.recipe import Recipe
from compressft.run.feed import Feeds, training_rows
from compressft.run.mixed import HEADS, FeedHeads, Side, fill_head, side_batches
from compressft.run.records import Run
from compressft.tasks.task import Task
from compressft.utils.collector import importing
from compressft.utils.foreign import load_tensors

# In a stage's folder: the heads of its other feeds, "NUMBER.name".
FILE = "heads.safetensors"


def fresh(recipe: Recipe, task: Task, seed: int) -> Any:
    """The recipe's model for a task; a head that it lacks is drawn by the seed."""
    with importing():
        from transformers import set_seed

        # With the model's own module.
        set_seed(seed)
        return load_model(recipe.model, task.auto_class, new_head=True, **task.model_arguments())


def donor(run: Run, feeds: Feeds, stage: Stage, task: Task) -> Any:
    """A model with the head that a stage wants: the last earlier stage's of this task and labels, else the base's."""
    stages = run.recipe.stages
    for earlier in reversed(stages[: stages.index(stage)]):
        for number, rows in enumerate(feeds.each(earlier)):
            if rows.task.key != task.key:
                continue
            folder = run.folder.stage(earlier.name)
            if not number:
                return load_compressed(folder)
            read_manifest(folder, "model")
            kept = load_tensors(folder / FILE)
            own = {
                name.partition(".")[2]: value for name, value in kept.items() if name.partition(".")[0] == str(number)
            }
            return fill_head(fresh(run.recipe, task, stage.train.seed), own)
    return fresh(run.recipe, task, stage.train.seed)


def kept_heads(heads: Mapping[int, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What a stage's folder keeps of its other feeds' heads, by file; nothing where there are none."""
    tensors = {f"{number}.{name}": value for number, own in heads.items() for name, value in own.items()}
    return {FILE: tensors} if tensors else {}


def add_sides(
    feeds: Feeds, stage: Stage, model: nn.Module, give: Callable[[Task], Any], rows_of_step: int
) -> list[Side]:
    """The other feeds of a stage, each with a model of its own head over the backbone that is trained.

    Their heads become children of `model`, to be trained and saved with it; `take_heads` takes them out.

    Args:
        give: gives a model with the head that a task wants.
        rows_of_step: how many rows all processes take at once.

    Raises:
        UserError: a head does not fit.
    """
    others = feeds.each(stage)[1:]
    if not others:
        return []
    device, sides = next(model.parameters()).device, []
    for number, (rows, count) in enumerate(zip(others, side_batches(feeds, stage, rows_of_step), strict=True), 1):
        view = over(model, give(rows.task).to(device), f"stages.{stage.name}.feeds.{number}")
        sides.append(Side(view, rows.task, training_rows(rows.train, rows.task, stage.train.seed), count))
    model.add_module(HEADS, FeedHeads([side.view for side in sides], model))
    return sides
