"""Optimal Brain Surgeon for groups of input columns: which of a linear layer's go first, and what makes up for them.

Hassibi & Stork (1992), for structures as in ZipLM (Kurtic, Frantar & Alistarh 2023, equations 1 and 2): a layer
W (out, in) with inputs of second moments H = E[x x^T] (in, in) loses tr((W - W') H (W - W')^T) when W' replaces W.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Removals between two updates of the whole inverse: one matrix product instead of that many rank-one updates.
BLOCK = 64


def removal(weight: Tensor, moment: Tensor, size: int) -> tuple[list[int], list[float]]:
    """Remove groups of `size` adjacent input columns one at a time, each time the one that adds the least loss.

    Removing the columns S adds sum over rows of W_S ((H^-1)_SS)^-1 W_S^T; the others then change by
    -W_S ((H^-1)_SS)^-1 (H^-1)_S,: and H^-1 loses S by block Gaussian elimination.

    Args:
        weight: (out, in) fp64.
        moment: H, (in, in) fp64, positive definite.

    Returns:
        the groups in the order in which they go, and the loss after 0, 1, ... removals relative to losing everything:
        from 0 to 1, never falling.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    order, added = _columns(weight, inverse) if size == 1 else _groups(weight, inverse, size)
    total = torch.tensor([0.0, *added], dtype=torch.float64).cumsum(0)
    whole = float(total[-1])
    return order, [1.0] * len(total) if whole == 0.0 else (total / whole).tolist()


def _groups(weight: Tensor, inverse: Tensor, size: int) -> tuple[list[int], list[float]]:
    """The plain algorithm, for few groups."""
    left = list(range(weight.shape[1] // size))
    order, added = [], []
    while left:
        number = len(left)
        blocks = inverse.view(number, size, number, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        # (groups, size, size), its own inverse: what removing the group costs per unit of its weights.
        roots = torch.linalg.cholesky(torch.linalg.inv(blocks))
        parts = weight.view(len(weight), number, size).transpose(0, 1) @ roots
        scores = parts.square().sum((1, 2))
        best = int(scores.argmin())
        order.append(left.pop(best))
        added.append(float(scores[best]))
        columns = torch.arange(best * size, (best + 1) * size)
        step = inverse[:, columns] @ roots[best]
        stay = torch.ones(number * size, dtype=torch.bool)
        stay[columns] = False
        weight = (weight - parts[best] @ step.t())[:, stay]
        inverse = (inverse - step @ step.t())[stay][:, stay]
    return order, added


def _columns(weight: Tensor, inverse: Tensor) -> tuple[list[int], list[float]]:
    """Single columns: the same, with W = weight - v u^T and H^-1 = inverse - u u^T brought up to date per block."""
    left = torch.arange(weight.shape[1])
    order: list[int] = []
    added: list[float] = []
    while len(left):
        block = min(BLOCK, len(left))
        diagonal, norms = inverse.diagonal().clone(), weight.square().sum(0)
        u, v = weight.new_zeros(len(left), block), weight.new_zeros(len(weight), block)
        stay = torch.ones(len(left), dtype=torch.bool)
        for b in range(block):
            scores = torch.where(stay, norms / diagonal, torch.inf)
            best = int(scores.argmin())
            before = u[best, :b].clone()
            column = inverse[:, best] - u[:, :b] @ before
            root = column[best].sqrt()
            u[:, b] = column / root
            v[:, b] = (weight[:, best] - v[:, :b] @ before) / root
            loss = v[:, b].square().sum()
            # |w - v u|^2 for every column w.
            product = weight.t() @ v[:, b] - u[:, :b] @ (v[:, :b].t() @ v[:, b])
            norms += u[:, b] * (u[:, b] * loss - 2.0 * product)
            diagonal -= u[:, b].square()
            order.append(int(left[best]))
            added.append(float(loss))
            stay[best] = False
        weight = (weight - v @ u.t())[:, stay]
        inverse = (inverse - u @ u.t())[stay][:, stay]
        left = left[stay]
    return order, added


def refit(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The best weights of the kept columns (out, kept): all removals' updates at once, W H_:K (H_KK)^-1."""
    factor = torch.linalg.cholesky(moment[kept][:, kept])
    return torch.cholesky_solve((weight @ moment[:, kept]).t(), factor).t()
