"""Error-compensated rounding of a weight, given what flows into its layer (Frantar et al. 2022, "GPTQ")."""

from __future__ import annotations

import torch
from torch import Tensor

from compressft.modules.int4 import Grid, grid_of

# Columns whose errors are passed on together (the paper's B, section 3.3, step 2).
TOGETHER = 128


@torch.no_grad()
def gptq(weight: Tensor, moments: Tensor, block: int, symmetric: bool, damping: float = 0.01) -> tuple[Tensor, Grid]:
    """Round a weight so that its outputs, rather than its entries, stay close.

    Columns are rounded in descending order of their inputs' energy; each one's error is made up for by those not yet
    rounded (algorithm 1). The grid is that of the given weight, whatever the order. Where `moments` is diagonal the
    result is rounding to nearest.

    Args:
        weight: (out, in).
        moments: (in, in), E[x x^T] of the inputs; columns without signal may be 0.
        damping: added to the diagonal, as a share of its mean (section 3.3, step 3).

    Returns:
        the rounded weight, fp32 (out, in), and its grid.

    Raises:
        ValueError: moments of another width.
    """
    rows, columns = weight.shape
    if moments.shape != (columns, columns):
        raise ValueError(f"gptq: moments {tuple(moments.shape)} do not fit a weight of {(rows, columns)}")
    grid = grid_of(weight, block, symmetric)
    hessian = moments.to(weight.device, torch.float32).clone()
    diagonal = hessian.diagonal()
    # A column without signal is rounded to nearest, whatever the others do.
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    left = weight.float()[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    place = torch.div(order, block, rounding_mode="floor")
    scale, zero = grid.scale[:, place], grid.zero_point[:, place]
    result = torch.empty_like(left)
    for first in range(0, columns, TOGETHER):
        last = min(first + TOGETHER, columns)
        errors = torch.empty(rows, last - first, device=left.device)
        for i in range(first, last):
            rounded = _nearest(left[:, i], scale[:, i], zero[:, i])
            result[:, i] = rounded
            error = (left[:, i] - rounded) / factor[i, i]
            left[:, i:last] -= error[:, None] * factor[i, i:last]
            errors[:, i - first] = error
        left[:, last:] -= errors @ factor[first:last, last:]
    return result[:, order.argsort()], grid


def _nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    inverse = torch.where(scale != 0, 1.0 / scale, 0.0)
    integers = torch.floor((values * inverse + zero).clamp(0.0, 15.0) + 0.5).clamp(max=15.0)
    return (integers - zero) * scale
