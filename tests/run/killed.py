"""Recipes trained in this process, and killed in the middle of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import Recipe
from compressft.run.feed import load_feeds
from compressft.run.folder import RunFolder
from compressft.run.program import train_stages
from compressft.run.records import Run, Trained
from compressft.run.trainer import CompressionTrainer


class Killed(Exception):
    """Stands for the end of the process."""


def trained(recipe: Recipe, folder: Path, resume: bool = False) -> Trained:
    """All stages, without what follows them."""
    with RunFolder(folder, recipe, resume) as held:
        feeds = load_feeds(recipe, load_tokenizer(recipe.model))
        return train_stages(Run(recipe, held, Console(file=io.StringIO())), feeds)


def killed_and_resumed(recipe: Recipe, folder: Path, at: int) -> Trained:
    """Killed at the start of its `at`-th step, then resumed to the end."""
    training_step, count = CompressionTrainer.training_step, 0

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CompressionTrainer, "training_step", step)
        trained(recipe, folder)
    return trained(recipe, folder, resume=True)
