"""Packages that a recipe asks for and that come with an extra: refused before anything is read where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from compressft.errors import UserError
from compressft.recipe.recipe import Recipe


def refuse_missing(recipe: Recipe) -> None:
    """Say what a recipe's trackers and optimisers need and is not installed.

    Raises:
        UserError: a package is missing; with the command that installs it.
    """
    for name in recipe.report_to:
        if find_spec(name) is None:
            raise UserError(f"report_to: {name} is not installed; pip install {name}")
    for stage in recipe.stages:
        optimizer = stage.train.optimizer
        if optimizer.endswith("8bit") and find_spec("bitsandbytes") is None:
            raise UserError(
                f"stages.{stage.name}.train.optimizer: {optimizer} comes with bitsandbytes, which is not installed; "
                "pip install bitsandbytes"
            )
