"""A task's metrics batch by batch: of a row is kept what its metric needs, never its logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from compressft.tasks.task import IGNORE, Task


class Scores:
    """Collects the evidence of batches; what it holds grows with the rows (and tokens), not with labels or pieces."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._evidence: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """One batch: logits (B, C) or (B, T, C), and labels as the task collates them."""
        self._evidence.append(self.task.evidence(logits, labels).cpu().numpy())
        self._labels.append(labels.cpu().numpy())

    def metrics(self) -> dict[str, float]:
        """The task's metrics of all that was added; at least one batch."""
        return self.task.metrics(_joined(self._evidence), _joined(self._labels))


def _joined(batches: Sequence[np.ndarray]) -> np.ndarray:
    """One array of all rows; what was padded to its batch's width is padded to the widest."""
    if batches[0].ndim == 1:
        return np.concatenate(batches)
    width = max(batch.shape[1] for batch in batches)
    return np.concatenate(
        [np.pad(batch, ((0, 0), (0, width - batch.shape[1])), constant_values=IGNORE) for batch in batches]
    )
