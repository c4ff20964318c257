"""Masks of one bit a weight, and the linear layer that computes from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressft_kernels.reference.effective import effective_weight
from compressft_kernels.reference.operands import describe, rows, to_compute


def _places(like: Tensor) -> Tensor:
    """The values of a byte's bits; no shifts, which torch's ONNX export translates wrongly for uint8."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask to one bit an entry.

    Args:
        mask: (..., columns) bool.

    Returns:
        (..., ceil(columns / 8)) uint8. Column c of a row is bit c % 8 (least significant first) of its byte c // 8;
        the last byte's spare bits are 0.

    Raises:
        ValueError: a mask that is not bool, or has no dimension.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise ValueError(f"pack_mask: mask {tuple(mask.shape)} is {mask.dtype}; want (..., columns) bool")
    padded = F.pad(mask, (0, -mask.shape[-1] % 8))
    # Not unflatten(-1, (-1, 8)): the -1 is ambiguous for an empty mask.
    eights = padded.reshape(*mask.shape[:-1], padded.shape[-1] // 8, 8).to(torch.uint8)
    return (eights * _places(mask)).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """The mask that `pack_mask` packed.

    Args:
        bits: (..., ceil(columns / 8)) uint8; spare bits are ignored.
        columns: entries in a row.

    Returns:
        (..., columns) bool.

    Raises:
        ValueError: bits of another dtype or width.
    """
    if bits.dtype != torch.uint8 or bits.dim() == 0 or columns < 0 or bits.shape[-1] != (columns + 7) // 8:
        raise ValueError(
            f"unpack_mask: bits {tuple(bits.shape)} are {bits.dtype}; "
            f"want (..., {(columns + 7) // 8}) uint8 for {columns} columns"
        )
    return (bits.unsqueeze(-1) & _places(bits)).ne(0).flatten(-2)[..., :columns]


def _kept(values: Tensor, bits: Tensor) -> Tensor:
    """values * mask, in values' layout."""
    return torch.empty_like(values).copy_(unpack_mask(bits, values.shape[1])).mul_(values)


def _masked_weight(weight: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    return effective_weight(weight, bits, dtype, lambda: _kept(weight, bits).to(dtype))


class PackedLinearFunction(torch.autograd.Function):
    """Saves weight and bits; x only where the weight is trained."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bits: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, _masked_weight(weight, bits, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bits, _ = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bits = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _masked_weight(weight, bits, dy.dtype)
        if ctx.needs_input_grad[1]:
            dweight = _kept(rows(dy).t() @ rows(x), bits).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            dbias = rows(dy).sum(0)
        return dx, dweight, None, dbias


def packed_linear(x: Tensor, weight: Tensor, bits: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y = x (W * mask)^T + b with the mask packed by `pack_mask`: what `masked_linear` gives for that mask.

    Gradients for x and bias, and for the kept entries of weight if it requires grad. Once differentiable. On CPU the
    masked weight is kept per (weight, bits) pair and reused until either changes or any optimiser steps.

    Args:
        x: (..., in), floating.
        weight: (out, in), x's dtype (under autocast any).
        bits: (out, ceil(in / 8)) uint8.
        bias: (out,), x's dtype (under autocast any).

    Returns:
        (..., out), x's dtype (under autocast, autocast's).

    Raises:
        ValueError: shapes or dtypes that do not fit, named in the message.

    Source: the saved form of Zhao et al., "Masking as an efficient alternative to finetuning" (EMNLP 2020).
    """
    fits = weight.dim() == 2 and x.dim() >= 1 and bits.dtype == torch.uint8
    fits = fits and bits.shape == (weight.shape[0], (weight.shape[1] + 7) // 8)
    if not fits or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        given = describe(x=x, weight=weight, bits=bits, bias=bias)
        raise ValueError(
            f"packed_linear: {given} do not fit (bits are {bits.dtype}); "
            "want x (..., in), weight (out, in), bits (out, ceil(in / 8)) uint8, bias (out,)"
        )
    x, bias = to_compute("packed_linear", x, bias, weight=weight)
    y = PackedLinearFunction.apply(x, weight, bits, bias)
    assert isinstance(y, Tensor)
    return y
