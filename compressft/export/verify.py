"""Prove that the exported file does what the trained model does, on whole splits; say where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressft.data.tasks import Task
from compressft.export.session import batches_by_length, open_session, scatter, session_logits

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

    def row(self) -> dict[str, Any]:
        """As it stands in report.json."""
        return {name: value for name, value in vars(self).items() if name != "failure"}


@torch.no_grad()
def model_logits(
    model: nn.Module, task: Task, features: Sequence[Mapping[str, Any]], batch: int = 32
) -> list[np.ndarray]:
    """Logits per row of a torch model in eval mode, fp32, padding cut off for token tasks."""
    model.eval()
    device = next(model.parameters()).device
    rows: list[Any] = [None] * len(features)
    for indices in batches_by_length(features, batch):
        padded = task.collate([{k: v for k, v in features[i].items() if k != "labels"} for i in indices])
        logits = model(**{k: v.to(device) for k, v in padded.items()}).logits
        scatter(rows, indices, logits.float().cpu().numpy(), features)
    return rows


def metric(task: Task, rows: Sequence[np.ndarray], features: Sequence[Mapping[str, Any]]) -> float:
    """The task's metric of per-row logits."""
    return task.score(*stacked(task, rows, features))[task.metric]


def stacked(
    task: Task, rows: Sequence[np.ndarray], features: Sequence[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Per-row logits and labels as arrays; token tasks are padded (labels with the ignored index)."""
    labels = task.collate([dict(f) for f in features])["labels"].numpy()
    if rows[0].ndim == 1:
        return np.stack(rows), labels
    width = labels.shape[1]
    return np.stack([np.pad(row, ((0, width - len(row)), (0, 0))) for row in rows]), labels


@dataclass(frozen=True)
class Ran:
    """What was run: a split's name and rows, in batches of a size, by kernels ("default" or "exact")."""

    split: str
    features: Sequence[Mapping[str, Any]]
    batch: int
    kernels: str = "default"


def compare(ran: Ran, task: Task, trained: Sequence[np.ndarray], exported: Sequence[np.ndarray], limits: Any) -> Check:
    """Compare logits row by row against a recipe's export limits."""
    features = ran.features
    error = max(float(np.abs(a - b).max()) for a, b in zip(trained, exported, strict=True))
    agreement = None
    if task.type != "regression":
        same = [task.predictions(a[None]) == task.predictions(b[None]) for a, b in zip(trained, exported, strict=True)]
        agreement = float(np.concatenate([s.reshape(-1) for s in same]).mean())
    scores = [metric(task, rows, features) for rows in (trained, exported)]
    drop = (scores[0] - scores[1]) * (1 if task.greater_is_better else -1 / max(scores[0], 1e-9))
    failure = None
    if not np.isfinite(error):
        failure = "the file's logits are not finite"
    elif agreement is not None and agreement < limits.label_agreement:
        failure = f"label agreement {agreement:.4f} is below export.label_agreement {limits.label_agreement}"
    elif drop > limits.metric_drop:
        worse = f"more than export.metric_drop {limits.metric_drop} worse"
        failure = f"{task.metric} {scores[1]:.4f} is {worse} than {scores[0]:.4f}"
    elif limits.max_abs_error is not None and error > limits.max_abs_error:
        failure = f"logit error {error:.3g} is above export.max_abs_error {limits.max_abs_error}"
    return Check(ran.split, ran.kernels, ran.batch, len(features), error, agreement, scores[0], scores[1], failure)


def verify(
    file: Path, model: nn.Module, task: Task, splits: Mapping[str, Sequence[Mapping[str, Any]]], limits: Any
) -> list[Check]:
    """Every split, with exact and with default kernels, at batch 1 and in padded batches.

    Args:
        limits: a recipe's `export`.
    """
    trained = {name: model_logits(model, task, features) for name, features in splits.items()}
    checks = []
    for kernels in KERNELS:
        # One live session at a time: several would spin against each other.
        session = open_session(file, exact=kernels == "exact")
        for name, features in splits.items():
            for size in (1, limits.batch):
                exported = session_logits(session, task, features, size)
                checks.append(compare(Ran(name, features, size, kernels), task, trained[name], exported, limits))
        del session
    return checks
