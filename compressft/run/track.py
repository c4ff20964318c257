"""What trackers (wandb, tensorboard, mlflow, trackio) are told of a stage, through the Trainer's `report_to`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from compressft.recipe.program import Stage
from compressft.run.records import Run


@dataclass(frozen=True)
class Tracking:
    """Who is told, and under which names.

    Attributes:
        report_to: trackers, as TrainingArguments name them.
        project: the recipe's name, under which its runs stand together.
        name: of this run's stage.
        folder: where files of trackers go that have no place of their own.
    """

    report_to: tuple[str, ...] = ()
    project: str = "compressft"
    name: str | None = None
    folder: Path | None = None

    def settle(self, callbacks: Sequence[TrainerCallback]) -> None:
        """Send tensorboard's files to the run directory, where the environment names no other place."""
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and self.folder is not None:
                callback.logging_dir = callback.logging_dir or str(self.folder)


def tracking(run: Run, stage: Stage) -> Tracking:
    """That of a stage of a run."""
    root = run.folder.root
    return Tracking(run.recipe.report_to, run.recipe.name, f"{root.name}-{stage.name}", root / "tracking" / stage.name)


class Ends(TrainerCallback):
    """Ends wandb's run with the stage; the next one would go on in it. The other trackers end theirs themselves."""

    def on_train_end(self, args, state, control, **kwargs):
        if "wandb" in (args.report_to or ()):
            import_module("wandb").finish()


def flat(terms: Mapping[str, float], status: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Loss terms and what Transforms have reached, as scalars by name: `terms/logits`, `int8/bits/now`, ..."""
    found: dict[str, Any] = {f"terms/{name}": value for name, value in terms.items()}
    for kind, values in status.items():
        for name, pair in values.items():
            found |= {f"{kind}/{name}/{when}": float(value) for when, value in pair.items()}
    return found
