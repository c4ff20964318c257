"""Four-bit weights in blocks along the input, with the integers and scales of onnxruntime's `MatMulNBits`.

A row is cut into blocks of `block` adjacent inputs, the last one filled up with zeros. Symmetric: scale = v / -8 for
the block's value v of greatest magnitude (its sign included), zero point 8. Asymmetric: the range extended to contain
0, scale = (max - min) / 15, zero point = round(-min / scale). Integers are round(w * (1 / scale) + zero point) in
[0, 15], halves away from zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ZERO = 8.0


class Grid(NamedTuple):
    """What a row's blocks are rounded to: `scale` and `zero_point`, fp32 (rows, blocks)."""

    scale: Tensor
    zero_point: Tensor


def blocks(values: Tensor, block: int) -> Tensor:
    """(..., columns) -> (..., ceil(columns / block), block), filled up with zeros."""
    return F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))


def grid_of(weight: Tensor, block: int, symmetric: bool) -> Grid:
    """The grid of a weight (rows, columns); a block of zeros has scale 0."""
    low, high = torch.aminmax(blocks(weight.detach().float(), block), dim=-1)
    if symmetric:
        scale = torch.where(high.abs() > low.abs(), high, low) / -8.0
        return Grid(scale, torch.full_like(scale, ZERO))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / 15.0
    return Grid(scale, _rounded(torch.where(scale != 0, -low / scale, 0.0)))


def quantise(weight: Tensor, block: int, grid: Grid) -> Tensor:
    """Integers in [0, 15] as fp32, (rows, blocks, block); fillings are the zero point."""
    inverse = torch.where(grid.scale != 0, 1.0 / grid.scale, 0.0)
    return _rounded(blocks(weight.detach().float(), block) * inverse[..., None] + grid.zero_point[..., None])


def dequantise(integers: Tensor, grid: Grid, columns: int) -> Tensor:
    """(rows, blocks, block) -> the weight (rows, columns) they stand for, fp32."""
    return ((integers - grid.zero_point[..., None]) * grid.scale[..., None]).flatten(-2)[..., :columns]


def fake_quantise(weight: Tensor, block: int, symmetric: bool) -> Tensor:
    """The weight (rows, columns) rounded to its own grid, in its dtype; no graph."""
    grid = grid_of(weight, block, symmetric)
    return dequantise(quantise(weight, block, grid), grid, weight.shape[-1]).to(weight.dtype)


def round_inputs(x: Tensor, block: int) -> Tensor:
    """(..., in) as `accuracy_level` 4 sees it: s8 per block, scale = max|x| / 127, halves to even; no graph."""
    parts = blocks(x.detach().float(), block)
    peak = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak != 0, 127.0 / peak, 0.0)
    return (torch.round(parts * inverse) * (peak / 127.0)).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def pack(integers: Tensor) -> Tensor:
    """Pairs along the last axis (even length) into bytes, the earlier one in the lower half."""
    integers = integers.to(torch.uint8)
    return integers[..., 0::2] | (integers[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`: uint8, twice as long."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def stored_bytes(rows: int, columns: int, block: int, symmetric: bool) -> int:
    """Bytes of a weight in `MatMulNBits`' layout: packed integers, fp32 scales, packed zero points."""
    count = -(-columns // block)
    return rows * (count * block // 2 + 4 * count + (0 if symmetric else (count + 1) // 2))


def on_live_columns(values: Tensor, columns: Tensor | None, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `change` to the columns whose factor is not 0, put next to one another; the others stay as they are.

    Blocks are thus cut as they will be once the dropped columns are really gone.
    """
    if columns is None or bool((columns != 0).all()):
        return change(values)
    live = torch.nonzero(columns).flatten()
    result = values.detach().clone()
    result[..., live] = change(values[..., live])
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, source: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(source: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly, with the gradient going to `source` (Bengio, Léonard & Courville 2013)."""
    return _StraightThrough.apply(source, value) if source.requires_grad else value  # type: ignore[return-value]


def _rounded(values: Tensor) -> Tensor:
    """Nearest integer in [0, 15], halves up."""
    values = values.clamp(0.0, 15.0)
    whole = values.floor()
    return whole + (values - whole >= 0.5)
