"""Lagrange: a constraint that training itself enforces, with multipliers that grow while it is violated."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Ascend(torch.autograd.Function):
    """Identity whose gradient is turned round: the optimiser's descent becomes ascent."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -grad


class Lagrange(nn.Module):
    """lambda1 * (s - t) + lambda2 * (s - t)^2, minimised in s and maximised in both lambdas (Wang et al. 2020, eq. 9).

    Parameters `linear` and `quadratic` (scalars, from 0); buffers `target` (t, set from the schedule) and `settled`
    (1 once the gates have been fixed).
    """

    target: Tensor
    settled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))
        self.register_buffer("target", torch.zeros(()))
        self.register_buffer("settled", torch.zeros((), dtype=torch.int64))

    def forward(self, sparsity: Tensor) -> Tensor:
        """The penalty, a scalar; differentiable in the sparsity (scalar) and the multipliers."""
        gap = sparsity - self.target
        return _Ascend.apply(self.linear) * gap + _Ascend.apply(self.quadratic) * gap.square()  # type: ignore[operator]
