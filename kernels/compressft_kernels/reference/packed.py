"""A linear layer whose mask is packed to one bit a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from compressft_kernels.nf4 import NF4
from compressft_kernels.reference.gated import gated_linear
from compressft_kernels.reference.operands import describe, to_compute


def check_packed(
    x: Tensor, weight: Tensor | NF4, bits: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in; raises what `packed_linear` documents."""
    size = tuple(weight.shape)
    fits = len(size) == 2 and x.dim() >= 1 and x.shape[-1] == size[1]
    fits = fits and (bits is None or (bits.dtype == torch.uint8 and bits.shape == (size[0], (size[1] + 7) // 8)))
    if not fits or (bias is not None and bias.shape != size[:1]):
        given = describe(x=x, weight=weight, bits=bits, bias=bias)
        raise ValueError(
            f"packed_linear: {given} do not fit{'' if bits is None else f' (bits are {bits.dtype})'}; "
            "want x (..., in), weight (out, in), bits (out, ceil(in / 8)) uint8, bias (out,)"
        )
    return to_compute("packed_linear", x, bias, weight=weight)


def packed_linear(x: Tensor, weight: Tensor | NF4, bits: Tensor | None, *, bias: Tensor | None = None) -> Tensor:
    """y = x (W * mask)^T + b with the mask packed by `pack_mask`: what `masked_linear` gives for that mask.

    Gradients for x and bias, and for the kept entries of a dense weight if it requires grad. Once differentiable. On
    CPU the masked weight is kept per (weight, bits) pair and reused until either changes or any optimiser steps.

    Args:
        x: (..., in), floating.
        weight: (out, in), x's dtype (under autocast any), or `NF4`.
        bits: (out, ceil(in / 8)) uint8; None keeps every weight.
        bias: (out,), x's dtype (under autocast any).

    Returns:
        (..., out), x's dtype (under autocast, autocast's).

    Raises:
        ValueError: shapes or dtypes that do not fit, named in the message.

    Source: the saved form of Zhao et al., "Masking as an efficient alternative to finetuning" (EMNLP 2020).
    """
    x, bias = check_packed(x, weight, bits, bias)
    return gated_linear(x, weight, bits, 0.0, bias)
