"""Prove that the exported file does what the trained model does, on whole splits; say where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressft.data.table import taken
from compressft.evaluation.logits import (
    batches_by_length,
    model_run,
    open_session,
    session_run,
)
from compressft.evaluation.scores import Scores
from compressft.recipe.parts import ExportConfig
from compressft.tasks.encode import lengths_of
from compressft.tasks.task import Feature, Task
from compressft.utils.phases import phase, steps

KERNELS = ("exact", "default")


@dataclass(frozen=True)
class Check:
    """One comparison of the file with the trained model; `failure` says what was missed.

    `kernels`: "exact" adds u8 x s8 products in 32 bits, which is what training computed and what most processors do;
    "default" is what a session on this machine does when it is not told otherwise.
    """

    split: str
    kernels: str
    batch: int
    rows: int
    max_abs_error: float
    label_agreement: float | None
    torch: float
    onnx: float
    failure: str | None

    def row(self) -> dict[str, object]:
        """As it stands in report.json."""
        return {name: value for name, value in vars(self).items() if name != "failure"}


@dataclass(frozen=True)
class Ran:
    """What was run: a split's rows in batches of a size, by kernels ("default" or "exact")."""

    split: str
    batch: int
    kernels: str = "default"


class Comparison:
    """Compares the logits of the trained model and of its file batch by batch, against a recipe's export limits.

    Args:
        trained: what the trained model scores on the same rows, added by whoever runs it.
    """

    def __init__(self, ran: Ran, task: Task, trained: Scores) -> None:
        self.ran = ran
        self.task = task
        self.trained = trained
        self.exported = Scores(task)
        self.rows = 0
        self.error = 0.0
        self.same = self.places = 0

    def add(self, trained: np.ndarray, exported: np.ndarray, rows: Sequence[Feature]) -> None:
        """One batch.

        Args:
            trained, exported: outputs by row, of which what is a row's own counts.
        """
        self.exported.add(torch.from_numpy(exported), self.task.truth(rows))
        self.rows += len(rows)
        for one, other, row in zip(trained, exported, rows, strict=True):
            one, other = self.task.own(one, row), self.task.own(other, row)
            # Unlike Python's, this maximum keeps what is no number.
            self.error = float(np.maximum(self.error, np.abs(one - other).max()))
            same = self._read(one) == self._read(other)
            self.same, self.places = self.same + int(same.sum()), self.places + same.numel()

    def _read(self, logits: np.ndarray) -> Tensor:
        return self.task.predictions(torch.from_numpy(logits)[None])

    def check(self, limits: ExportConfig) -> Check:
        """The outcome against a recipe's `export`."""
        agreement = None if not self.task.answers else self.same / self.places
        torch_score, onnx_score = (scores.metrics()[self.task.metric] for scores in (self.trained, self.exported))
        drop = (torch_score - onnx_score) * (1 if self.task.greater_is_better else -1 / max(torch_score, 1e-9))
        failure = None
        if not np.isfinite(self.error):
            failure = "the file's logits are not finite"
        elif agreement is not None and agreement < limits.label_agreement:
            failure = f"label agreement {agreement:.4f} is below export.label_agreement {limits.label_agreement}"
        elif drop > limits.metric_drop:
            worse = f"more than export.metric_drop {limits.metric_drop} worse"
            failure = f"{self.task.metric} {onnx_score:.4f} is {worse} than {torch_score:.4f}"
        elif limits.max_abs_error is not None and self.error > limits.max_abs_error:
            failure = f"logit error {self.error:.3g} is above export.max_abs_error {limits.max_abs_error}"
        ran = self.ran
        figures = (self.rows, self.error, agreement, torch_score, onnx_score)
        return Check(ran.split, ran.kernels, ran.batch, *figures, failure)


@phase("verification")
def verify(
    file: Path, model: nn.Module, task: Task, splits: Mapping[str, Sequence[Feature]], limits: ExportConfig
) -> list[Check]:
    """Every split, with exact and with default kernels, at batch 1 and in padded batches.

    The model and the file run side by side: a batch of the logits of each is in memory, not a split of them.

    Args:
        limits: a recipe's `export`.
    """
    trained = model_run(model, task)
    exported = {
        kernels: session_run(open_session(file, limits.threads, kernels == "exact"), task) for kernels in KERNELS
    }
    checks = []
    for name, features in splits.items():
        scores = Scores(task)
        ran = [Ran(name, size, kernels) for kernels in KERNELS for size in (1, limits.batch)]
        comparisons = [Comparison(one, task, scores) for one in ran]
        batches = batches_by_length(lengths_of(features, task), limits.batch)
        for indices in steps(batches, f"verifying on {name}"):
            rows = taken(features, indices)
            logits = trained(rows)
            scores.add(torch.from_numpy(logits), task.truth(rows))
            for one in comparisons:
                for start in range(0, len(rows), one.ran.batch):
                    part = slice(start, start + one.ran.batch)
                    one.add(logits[part], exported[one.ran.kernels](rows[part]), rows[part])
        checks += [one.check(limits) for one in comparisons]
    return sorted(checks, key=lambda check: KERNELS.index(check.kernels))
