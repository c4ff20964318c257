"""What travels together through a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import nn

from compressft.recipe.recipe import Recipe
from compressft.run.folder import RunFolder


@dataclass(frozen=True)
class Run:
    """A run that is under way: what it does, where it writes, whom it tells.

    Attributes:
        processes: how many it began with; None where that is not known, or as many as there are.
    """

    recipe: Recipe
    folder: RunFolder
    console: Console
    processes: int | None = None

    def say(self, text: str) -> None:
        """Tell a sentence, as it is."""
        self.console.print(text, highlight=False, soft_wrap=True)


@dataclass
class Begun:
    """What training begins with.

    Attributes:
        model: for the first stage's task.
        costs: what `Context` says of costs.
        base: the uncompressed model's shapes, parameters and operations, as reports say them.
    """

    model: Any
    costs: Mapping[str, Any]
    base: Mapping[str, Any]


@dataclass(frozen=True)
class Spent:
    """What a stage is told of those before it: their steps, and what is known of costs."""

    steps: int
    costs: Mapping[str, Any]


@dataclass(frozen=True)
class Trained:
    """The model that ships, on the CPU, and one record for each stage."""

    model: nn.Module
    stages: list[dict[str, Any]]
