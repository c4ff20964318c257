"""The hard-concrete distribution: gates in [0, 1] that can be exactly 0 and still have a gradient.

Louizos, Welling & Kingma (2018), section 2.2: a sigmoid of logistic noise, stretched to (low, high), clipped to [0, 1].
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from compressft_kernels.kept import Kept
from torch import Tensor
from torch.autograd.function import once_differentiable

# Movement pruning's L0 variant and CoFi; other papers use others.
TEMPERATURE = 2.0 / 3.0
LOW = -0.1
HIGH = 1.1
# The uniform noise stays this far from 0 and 1, where its logit is infinite.
EDGE = 1e-6


def sample(log_alpha: Tensor, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH) -> Tensor:
    """One gate per `log_alpha`, differentiable once; shape and dtype as `log_alpha`, noise from the global generator.

    Equations 10 and 11 of the paper: clip(low + (high - low) * sigmoid((logit(u) + log_alpha) / temperature)).
    """
    return gated(torch.ones_like(log_alpha), log_alpha, temperature, low, high)


def gated(
    values: Tensor, log_alpha: Tensor, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH
) -> Tensor:
    """values * sample(log_alpha), the same numbers from the same noise, for whole weight matrices.

    Both of one shape, differentiable once. The backward pass keeps `values` and the gates, and nothing in between.
    """
    return _Gated.apply(values, log_alpha, temperature, low, high)  # type: ignore[no-any-return]


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor]
    constants: tuple[float, float, float]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, values: Tensor, log_alpha: Tensor, temperature: float, low: float, high: float
    ) -> Tensor:
        z = torch.empty_like(log_alpha).uniform_(EDGE, 1.0 - EDGE).logit_().add_(log_alpha)
        if temperature != 1.0:
            z.div_(temperature)
        z.sigmoid_().mul_(high - low).add_(low).clamp_(0.0, 1.0)
        ctx.save_for_backward(values, z)
        ctx.constants = temperature, low, high
        return values * z

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        values, z = ctx.saved_tensors
        temperature, low, high = ctx.constants
        wanted = ctx.needs_input_grad
        to_values = (grad * z).to(values.dtype) if wanted[0] else None
        if not wanted[1]:
            return to_values, None, None, None, None
        # s (1 - s) = (z - low) (high - z) / (high - low)^2 with z = low + (high - low) s; nothing where z was clipped.
        slope = torch.rsub(z, high + low).mul_(z).sub_(low * high).div_((high - low) * temperature)
        # One pass, where comparisons and `masked_fill_` take four.
        torch.ops.aten.hardtanh_backward.grad_input(slope, z, 0.0, 1.0, grad_input=slope)
        return to_values, slope.mul_(grad).mul_(values), None, None, None


def deterministic(log_alpha: Tensor, low: float = LOW, high: float = HIGH, temperature: float = 1.0) -> Tensor:
    """The gates without noise: clip(low + (high - low) * sigmoid(log_alpha / temperature)), equation 13 for 1.0."""
    return _stretch(torch.sigmoid(log_alpha / temperature), low, high)


def open_probability(
    log_alpha: Tensor, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH
) -> Tensor:
    """P(sample > 0) = sigmoid(log_alpha - temperature * ln(-low / high)), equation 12: what an L0 penalty adds up."""
    shift = temperature * math.log(-low / high)
    return torch.sigmoid(log_alpha - shift if shift else log_alpha)


def _stretch(s: Tensor, low: float, high: float) -> Tensor:
    return (low + (high - low) * s).clamp(0.0, 1.0)
