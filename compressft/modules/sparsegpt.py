"""SparseGPT: prune a weight column by column and let the columns behind make up for the error."""

from __future__ import annotations

import torch
from torch import Tensor

from compressft.modules.rank import keep_largest, keep_pattern

# Columns whose masks are chosen together, and behind which updates are gathered.
BLOCK = 128


def sparsegpt(
    weight: Tensor, moment: Tensor, sparsity: float, groups: tuple[int, int] | None = None, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Prune one layer so that its outputs change little.

    Frantar & Alistarh (2023), algorithm 1: with H = E[x x^T] + damping * mean(diag) * I and U the upper Cholesky factor
    of H^-1, weights with the least w^2 / U_jj^2 of a block of columns go, and each column's error moves into the
    columns to its right along U's row.

    Args:
        weight: (out, in), any floating dtype.
        moment: E[x x^T] of the inputs, (in, in).
        sparsity: fraction to remove; exactly round((1 - sparsity) * out * in) weights stay.
        groups: (N, M): instead, N of every M adjacent columns stay. M must divide the columns.

    Returns:
        (new weight (out, in), 0 where it is pruned, in the weight's dtype; bool mask, True is kept)
    """
    rows, columns = weight.shape
    w = weight.to(torch.float64)
    h = moment.to(torch.float64).clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    # An input that is never there can do nothing: its weights go first.
    w = w.masked_fill(dead, 0.0)
    h.diagonal().add_(damping * float(h.diagonal().mean()))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    mask = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    step = BLOCK if groups is None else max(BLOCK - BLOCK % groups[1], groups[1])
    for first in range(0, columns, step):
        last = min(first + step, columns)
        u = upper[first:last, first:last]
        if groups is None:
            # Rounded over all columns so far, so that the sum is exact.
            number = round((1.0 - sparsity) * rows * last) - round((1.0 - sparsity) * rows * first)
            (mask[:, first:last],) = keep_largest([_saliency(w[:, first:last], u.diagonal())], number)
        errors = torch.zeros(rows, last - first, dtype=w.dtype, device=w.device)
        for j in range(first, last):
            if groups is not None and (j - first) % groups[1] == 0:
                # Within a block the pattern is chosen as late as possible: after the updates of the columns before.
                ahead = slice(j, j + groups[1])
                mask[:, ahead] = keep_pattern(_saliency(w[:, ahead], upper.diagonal()[ahead]), *groups)
            pruned = w[:, j] * mask[:, j]
            errors[:, j - first] = (w[:, j] - pruned) / upper[j, j]
            w[:, j + 1 : last] -= errors[:, j - first, None] * upper[j, j + 1 : last]
            w[:, j] = pruned
        w[:, last:] -= errors @ upper[first:last, last:]
    return w.to(weight.dtype), mask


def _saliency(w: Tensor, diagonal: Tensor) -> Tensor:
    """Error of the layer's output that removing a weight costs, (out, columns)."""
    return (w / diagonal) ** 2
