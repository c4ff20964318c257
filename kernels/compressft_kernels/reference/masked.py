"""A linear layer whose weight is masked by thresholded scores, trained by the straight-through estimator."""

from __future__ import annotations

from torch import Tensor

from compressft_kernels.nf4 import NF4
from compressft_kernels.reference.gated import gated_linear
from compressft_kernels.reference.operands import describe, to_compute


def check_masked(x: Tensor, weight: Tensor | NF4, scores: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in; raises what `masked_linear` documents."""
    size = tuple(weight.shape)
    fits = len(size) == 2 and x.dim() >= 1 and scores.shape == size
    if not fits or x.shape[-1] != size[1] or (bias is not None and bias.shape != size[:1]):
        given = describe(x=x, weight=weight, scores=scores, bias=bias)
        raise ValueError(
            f"masked_linear: {given} do not fit; want x (..., in), weight and scores (out, in), bias (out,)"
        )
    if not scores.is_floating_point():
        raise ValueError(f"masked_linear: scores {tuple(scores.shape)} are {scores.dtype}; want a floating dtype")
    return to_compute("masked_linear", x, bias, weight=weight)


def masked_linear(
    x: Tensor, weight: Tensor | NF4, scores: Tensor, *, threshold: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """y = x (W * [scores > threshold])^T + b, the mask trained through its scores.

    Gradients: x and bias as usual; scores get (dY^T X) * W, the identity straight-through estimator, so that a
    dropped weight's score still learns; a dense weight that requires grad gets dY^T X where it is kept, 0 elsewhere.
    Once differentiable. The masked weight is not saved for backward. On CPU one is kept per (weight, scores) pair
    and reused until either changes or any optimiser steps (what `effective_weight` cannot see, it says).

    Args:
        x: (..., in), floating.
        weight: (out, in), x's dtype (under autocast any), or `NF4`.
        scores: (out, in), any floating dtype. Scores at the threshold drop the weight, as do NaNs. The threshold is
            rounded to their dtype; -inf gives the dense layer bit for bit.
        bias: (out,), x's dtype (under autocast any).

    Returns:
        (..., out), x's dtype (under autocast, autocast's).

    Raises:
        ValueError: shapes or dtypes that do not fit, named in the message.

    Source: Zhao et al., "Masking as an efficient alternative to finetuning" (EMNLP 2020), section 3.
    """
    x, bias = check_masked(x, weight, scores, bias)
    return gated_linear(x, weight, scores, float(threshold), bias)
