"""A linear layer whose weight is masked by thresholded scores, trained by the straight-through estimator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressft_kernels.reference.effective import effective_weight
from compressft_kernels.reference.operands import describe, rows, to_compute


def _kept(values: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """values * [scores > threshold]; on CPU comparing into a float buffer is ten times as fast as `where`."""
    return torch.gt(scores, threshold, out=torch.empty_like(values)).mul_(values)


def _masked_weight(weight: Tensor, scores: Tensor, threshold: float, dtype: torch.dtype) -> Tensor:
    return effective_weight(weight, scores, (threshold, dtype), lambda: _kept(weight, scores, threshold).to(dtype))


class MaskedLinearFunction(torch.autograd.Function):
    """Saves x, weight and scores, and takes the masked weight anew (or kept) in backward."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
        return F.linear(x, _masked_weight(weight, scores, threshold, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, scores, _, threshold = inputs
        ctx.save_for_backward(x, weight, scores)
        ctx.threshold = threshold

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scores = ctx.saved_tensors
        dx = dweight = dscores = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _masked_weight(weight, scores, ctx.threshold, dy.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_effective = rows(dy).t() @ rows(x)
            if ctx.needs_input_grad[1]:
                dweight = _kept(d_effective, scores, ctx.threshold).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                dscores = d_effective.to(scores.dtype).mul_(weight)
        if ctx.needs_input_grad[3]:
            dbias = rows(dy).sum(0)
        return dx, dweight, dscores, dbias, None


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, *, threshold: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """y = x (W * [scores > threshold])^T + b, the mask trained through its scores.

    Gradients: x and bias as usual; scores get (dY^T X) * W, the identity straight-through estimator, so that a
    dropped weight's score still learns; weight gets dY^T X where it is kept and 0 elsewhere, if it requires grad.
    Once differentiable. The masked weight is not saved for backward. On CPU one is kept per (weight, scores) pair
    and reused until either changes or any optimiser steps (what `effective_weight` cannot see, it says).

    Args:
        x: (..., in), floating.
        weight: (out, in), x's dtype (under autocast any).
        scores: (out, in), any floating dtype. Scores at the threshold drop the weight, as do NaNs. The threshold is
            rounded to their dtype; -inf gives the dense layer bit for bit.
        bias: (out,), x's dtype (under autocast any).

    Returns:
        (..., out), x's dtype (under autocast, autocast's).

    Raises:
        ValueError: shapes or dtypes that do not fit, named in the message.

    Source: Zhao et al., "Masking as an efficient alternative to finetuning" (EMNLP 2020), section 3.
    """
    fits = weight.dim() == 2 and x.dim() >= 1 and scores.shape == weight.shape
    if not fits or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        given = describe(x=x, weight=weight, scores=scores, bias=bias)
        raise ValueError(
            f"masked_linear: {given} do not fit; want x (..., in), weight and scores (out, in), bias (out,)"
        )
    if not scores.is_floating_point():
        raise ValueError(f"masked_linear: scores {tuple(scores.shape)} are {scores.dtype}; want a floating dtype")
    x, bias = to_compute("masked_linear", x, bias, weight=weight)
    y = MaskedLinearFunction.apply(x, weight, scores, bias, float(threshold))
    assert isinstance(y, Tensor)
    return y
