"""Matrices of low rank as two factors: their product, to the bit on every machine, and finding them in a difference."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows and columns of the part that tells whether a whole decomposition is worth its time.
PROBED = 128


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """(out, rank) x (rank, in) -> (out, in), added up in the order of the ranks.

    A library's matrix product would add up in an order of its own, and another machine's would give other bits.
    """
    out = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    for k in range(left.shape[1]):
        out += left[:, k : k + 1] * right[k]
    return out


def nearest(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (out, rank) and (rank, in), fp32, of the nearest matrix of that rank (Eckart & Young 1936)."""
    left, sizes, right = torch.linalg.svd(difference, full_matrices=False)
    root = sizes[:rank].sqrt()
    return (left[:, :rank] * root).float().contiguous(), (root[:, None] * right[:rank]).float().contiguous()


def find(tensor: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors of `tensor - old` where that is of low rank but for the rounding of the sum; None where it is not.

    Args:
        tensor, old: (out, in) fp32.
    """
    changed = tensor != old
    rows, columns = _spread(changed.any(1)), _spread(changed.any(0))
    if not len(rows) or not (tensor.isfinite().all() and old.isfinite().all()):
        return None
    # In doubles the whole takes several times the tensor's memory, and most tensors end at the part.
    of_part = tensor[rows][:, columns]
    part = of_part.double() - old[rows][:, columns].double()
    if 2 * _rank(torch.linalg.svdvals(part), of_part) >= min(part.shape):
        return None
    difference = tensor.double() - old.double()
    rank = _rank(torch.linalg.svdvals(difference), tensor)
    return nearest(difference, rank) if 2 * rank * sum(tensor.shape) < tensor.numel() else None


def _spread(present: Tensor) -> Tensor:
    """Up to `PROBED` of the places that are True, evenly spread."""
    places = present.nonzero().flatten()
    return places[:: max(-(-len(places) // PROBED), 1)]


def _rank(sizes: Tensor, tensor: Tensor) -> int:
    """How many singular values stand out of what rounding each entry of `tensor` gives."""
    spacing = (torch.nextafter(tensor.abs(), tensor.new_tensor(torch.inf)) - tensor.abs()).double()
    # A matrix of independent errors has no singular value above their deviation times this (Bai & Yin 1993).
    noise = spacing.square().mean().div(12).sqrt() * (tensor.shape[0] ** 0.5 + tensor.shape[1] ** 0.5)
    return int((sizes > 2 * noise).sum())
