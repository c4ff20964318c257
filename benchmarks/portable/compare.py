"""What a machine's logits say next to torch's: labels that agree, the largest error, the closest decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.portable.rows import Rows


@dataclass(frozen=True)
class Comparison:
    """All rows at one batch size.

    `labels` that were compared (one a row, or one a token), `agreement` the share that is torch's, `error` the largest
    logit difference, `distinct` labels that torch gives, `missed` [torch's lead of its label over the runner-up] of the
    labels that differ, `closest` the least such lead of all.
    """

    batch: int
    labels: int
    agreement: float
    error: float
    distinct: int
    missed: tuple[float, ...]
    closest: float


def by_row(rows: Rows, logits: Sequence[Any], size: int) -> list[np.ndarray]:
    """A machine's logits of the batches of one size, row by row in the rows' order, padding cut off."""
    found: dict[int, np.ndarray] = {}
    for batch_size, members, batch in zip(rows.sizes, rows.members, logits, strict=True):
        if batch_size == size:
            for i, row in zip(members, batch, strict=True):
                value = np.array(row, np.float32)
                found[i] = value[: rows.lengths[i]] if value.ndim == 2 else value
    return [found[i] for i in range(len(rows.lengths))]


def compare(size: int, torch: Sequence[np.ndarray], machine: Sequence[np.ndarray]) -> Comparison:
    """Rows of logits (labels,) or (tokens, labels), at least two labels each."""
    want, got = (np.concatenate([np.atleast_2d(row) for row in rows]) for rows in (torch, machine))
    labels = want.argmax(-1)
    order = np.sort(want, axis=-1)
    lead = order[:, -1] - order[:, -2]
    # What is not a number agrees with nothing.
    same = (labels == got.argmax(-1)) & np.isfinite(got).all(-1)
    return Comparison(
        size,
        len(labels),
        float(same.mean()),
        float(np.abs(want - got).max()),
        len(np.unique(labels)),
        tuple(sorted(float(value) for value in lead[~same])),
        float(lead.min()),
    )


def comparisons(rows: Rows, logits: Sequence[Any]) -> list[Comparison]:
    """At every batch size."""
    found = []
    for size, answers in rows.torch.items():
        torch = [np.array(row, np.float32) for row in answers]
        found.append(compare(int(size), torch, by_row(rows, logits, int(size))))
    return found
