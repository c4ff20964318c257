"""A linear layer whose weight is masked, by scores or by packed bits, and may be stored as NF4."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressft_kernels.kept import Kept
from compressft_kernels.nf4 import NF4, dequantise
from compressft_kernels.reference.bits import unpack_mask
from compressft_kernels.reference.effective import effective_weight
from compressft_kernels.reference.operands import rows

Size = tuple[int, int]


def parts(weight: Tensor | NF4) -> tuple[Tensor, list[Tensor], Size]:
    """(stored weight, the tables to dequantise it by or [], (out, in))."""
    if isinstance(weight, NF4):
        return weight.packed, weight.tables(), weight.shape
    return weight, [], (weight.shape[0], weight.shape[1])


def keep(values: Tensor, gate: Tensor | None, threshold: float) -> Tensor:
    """values (out, in) where the gate keeps them, else 0: scores above the threshold, or set bits."""
    if gate is None:
        return values
    if gate.dtype == torch.uint8:
        return torch.empty_like(values).copy_(unpack_mask(gate, values.shape[1])).mul_(values)
    # On CPU comparing into a float buffer is ten times as fast as `where`.
    return torch.gt(gate, threshold, out=torch.empty_like(values)).mul_(values)


def bare(weight: Tensor, quant: list[Tensor], size: Size, dtype: torch.dtype) -> Tensor:
    """The weight without its mask; dense ones in their own dtype."""
    return dequantise(weight, quant, size, dtype) if quant else weight


def effective(
    weight: Tensor, quant: list[Tensor], gate: Tensor | None, threshold: float, size: Size, dtype: torch.dtype
) -> Tensor:
    """The masked weight (out, in) in `dtype`, built again."""
    return keep(bare(weight, quant, size, dtype), gate, threshold).to(dtype)


def weight_gradients(
    dy: Tensor, x: Tensor, wanted: tuple[bool, bool], weight: Tensor, quant: list[Tensor], gate: Tensor | None,
    threshold: float, size: Size,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of the weight and of the scores where wanted; dy (..., out), x (..., in)."""
    dweight = dscores = None
    d_effective = rows(dy).t() @ rows(x)
    if wanted[0]:
        dweight = keep(d_effective, gate, threshold).to(weight.dtype)
    if wanted[1] and gate is not None:
        dscores = d_effective.to(gate.dtype).mul_(bare(weight, quant, size, gate.dtype))
    return dweight, dscores


# x, weight, gate, bias, threshold, size and the tables of a quantised weight.
_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, Size, *tuple[Tensor, ...]]


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor | None, *tuple[Tensor, ...]]
    threshold: float
    size: Size


class GatedLinearFunction(torch.autograd.Function):
    """Saves the weight as stored, the gate, and x where a gradient needs it; backward masks the weight again."""

    @staticmethod
    def _weight(
        weight: Tensor, quant: list[Tensor], gate: Tensor | None, threshold: float, size: Size, dtype: torch.dtype
    ) -> Tensor:
        if quant or gate is None:  # what is stored in 4 bits is not kept in 32 as well
            return effective(weight, quant, gate, threshold, size, dtype)
        key = (threshold, dtype)
        return effective_weight(weight, gate, key, lambda: effective(weight, quant, gate, threshold, size, dtype))

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        bias: Tensor | None,
        threshold: float,
        size: Size,
        *quant: Tensor,
    ) -> Tensor:
        return F.linear(x, GatedLinearFunction._weight(weight, [*quant], gate, threshold, size, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: _Context, inputs: _Inputs, output: Tensor) -> None:
        x, weight, gate, _, ctx.threshold, ctx.size, *quant = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, weight, gate, *quant)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, gate, *quant = ctx.saved_tensors
        dx = dweight = dscores = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ GatedLinearFunction._weight(weight, quant, gate, ctx.threshold, ctx.size, dy.dtype)
        wanted = (ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        if any(wanted):
            dweight, dscores = weight_gradients(dy, x, wanted, weight, quant, gate, ctx.threshold, ctx.size)
        if ctx.needs_input_grad[3]:
            dbias = rows(dy).sum(0)
        return dx, dweight, dscores, dbias, None, None, *[None for _ in quant]


def gated_linear(x: Tensor, weight: Tensor | NF4, gate: Tensor | None, threshold: float, bias: Tensor | None) -> Tensor:
    """x (..., in) times the masked weight transposed, plus bias; the operands have been checked."""
    stored, quant, size = parts(weight)
    y = GatedLinearFunction.apply(x, stored, gate, bias, threshold, size, *quant)
    assert isinstance(y, Tensor)
    return y
