"""A task's metrics batch by batch: of a row is kept what its metric needs, never its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from compressft.tasks.task import IGNORE, Task


class Scores:
    """Collects the evidence of batches; what it holds grows with the rows (and tokens), not with labels or pieces."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._evidence: list[np.ndarray] = []
        self._truth: list[np.ndarray] = []

    def add(self, answers: Tensor, truth: Any) -> None:
        """One batch: its answers, as `Task.evidence` takes them, and its rows' `Task.truth`."""
        self._evidence.append(self.task.evidence(answers, truth).cpu().numpy())
        self._truth.append(np.asarray(truth))

    @property
    def kept(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What was collected, for `join`."""
        return self._evidence, self._truth

    def join(self, others: Sequence[tuple[list[np.ndarray], list[np.ndarray]]]) -> None:
        """Take what others, in other processes, have collected."""
        for evidence, truth in others:
            self._evidence += evidence
            self._truth += truth

    def metrics(self) -> dict[str, float]:
        """The task's metrics of all that was added; at least one batch."""
        return self.task.metrics(_joined(self._evidence), _joined(self._truth))


def _joined(batches: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all rows; what was padded to its batch's width is padded to the widest."""
    width = max(batch.shape[1] if batch.ndim == 2 else 0 for batch in batches)
    if not width:
        return np.concatenate(batches)
    return np.concatenate(
        [np.pad(batch, ((0, 0), (0, width - batch.shape[1])), constant_values=IGNORE) for batch in batches]
    )
