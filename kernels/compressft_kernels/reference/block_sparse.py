"""A linear layer of which only the live tiles are stored and multiplied."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compressft_kernels.kept import Kept
from compressft_kernels.reference.effective import effective_weight
from compressft_kernels.reference.operands import describe, rows, to_compute

# Shapes: T rows of x, R x C tiles of (bo, bi), n live. A tile is (its place in `blocks`, its row, its column).
Tile = tuple[int, int, int]
# A tile row's (or column's) number, what it is multiplied with, and its live tiles beneath one another.
Line = tuple[int, range | Tensor, Tensor]

# Rows of x at a time, so that what is gathered of them is still in cache when it is multiplied.
CHUNK = 1024
# Gathering and small products cost a tile as much as this many more rows of it would. Measured on two cores in
# float32: one dense product is quicker from densities of 0.14, 0.29, 0.49 and 0.68 on for tiles of 16, 32, 64 and 128.
OVERHEAD = 80


def _live(layout: Tensor) -> list[Tile]:
    return [(place, row, column) for place, (row, column) in enumerate(layout.nonzero().tolist())]


def _dense_is_quicker(blocks: Tensor, layout: Tensor) -> bool:
    n, bo, bi = blocks.shape
    return n * (1 + OVERHEAD / max(1, min(bo, bi))) >= layout.numel()


def _along(tiles: list[Tile], axis: int, length: int) -> list[list[Tile]]:
    """The live tiles of every tile row (axis 1) or tile column (axis 2)."""
    lines: list[list[Tile]] = [[] for _ in range(length)]
    for tile in tiles:
        lines[tile[axis]].append(tile)
    return lines


def _where(indices: list[int], device: torch.device) -> range | Tensor:
    """Ascending indices, as a range where they are adjacent: that takes no copy."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return range(indices[0], indices[-1] + 1)
    return torch.tensor(indices, device=device)


def _take(tensor: Tensor, where: range | Tensor, dim: int) -> Tensor:
    if isinstance(where, range):
        return tensor.narrow(dim, where.start, len(where))
    return tensor.index_select(dim, where)


def _multiply(x_TLi: Tensor, lines: list[Line], y_TMo: Tensor) -> Tensor:
    """y's lines, written in place: the live tiles times their tiles of x; zeros where none is live."""
    for start in range(0, x_TLi.shape[0], CHUNK):
        x, y = x_TLi[start : start + CHUNK], y_TMo[start : start + CHUNK]
        for line, where, weight in lines:
            torch.mm(_take(x, where, 1).flatten(1), weight, out=y[:, line])
    live = {line for line, _, _ in lines}
    for line in range(y_TMo.shape[1]):
        if line not in live:
            y_TMo[:, line].zero_()
    return y_TMo


class _Tiled(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor]
    tiles: list[Tile]


class _Scattered(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]


class BlockSparseLinearFunction(torch.autograd.Function):
    """One product per tile row (forward, blocks' gradient) or tile column (x's gradient), over its live tiles."""

    @staticmethod
    def forward(x_TCi: Tensor, blocks: Tensor, bias: Tensor | None, lines: int, tiles: list[Tile]) -> Tensor:
        todo = []
        for row, line in enumerate(_along(tiles, 1, lines)):
            if line:
                weight = blocks[line[0][0] : line[-1][0] + 1].transpose(0, 1).flatten(1).t()
                todo.append((row, _where([column for _, _, column in line], blocks.device), weight))
        y_TRo = _multiply(x_TCi, todo, x_TCi.new_empty(x_TCi.shape[0], lines, blocks.shape[1]))
        return y_TRo if bias is None else y_TRo.add_(bias.view(y_TRo.shape[1:]))

    @staticmethod
    def setup_context(
        ctx: _Tiled, inputs: tuple[Tensor, Tensor, Tensor | None, int, list[Tile]], output: Tensor
    ) -> None:
        x_TCi, blocks, _, _, ctx.tiles = inputs
        ctx.save_for_backward(x_TCi, blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Tiled, dy_TRo: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TCi, blocks = ctx.saved_tensors
        dx_TCi = dblocks = None
        if ctx.needs_input_grad[0]:
            todo = []
            for column, line in enumerate(_along(ctx.tiles, 2, x_TCi.shape[1])):
                if line:
                    weight = _take(blocks, _where([place for place, _, _ in line], blocks.device), 0).flatten(0, 1)
                    todo.append((column, _where([row for _, row, _ in line], blocks.device), weight))
            dx_TCi = _multiply(dy_TRo, todo, x_TCi.new_empty(x_TCi.shape))
        if ctx.needs_input_grad[1]:
            dblocks = torch.empty_like(blocks)
            for row, line in enumerate(_along(ctx.tiles, 1, dy_TRo.shape[1])):
                if line:
                    x_Tki = _take(x_TCi, _where([column for _, _, column in line], blocks.device), 1).flatten(1)
                    d_oki = (dy_TRo[:, row].t() @ x_Tki).unflatten(1, (len(line), blocks.shape[2]))
                    dblocks[line[0][0] : line[-1][0] + 1] = d_oki.transpose(0, 1)
        dbias = dy_TRo.sum(0).flatten() if ctx.needs_input_grad[2] else None
        return dx_TCi, dblocks, dbias, None, None


def _by_tile(weight: Tensor, layout: Tensor) -> Tensor:
    """(out, in) seen as (R, C, bo, bi)."""
    (out, width), (lines, columns) = weight.shape, layout.shape
    return weight.view(lines, out // lines, columns, width // columns).transpose(1, 2)


def _scattered(blocks: Tensor, layout: Tensor) -> Tensor:
    """The weight (out, in), kept while blocks and layout are unchanged."""

    def build() -> Tensor:
        weight = blocks.new_zeros(layout.shape[0] * blocks.shape[1], layout.shape[1] * blocks.shape[2])
        _by_tile(weight, layout)[layout.nonzero(as_tuple=True)] = blocks
        return weight

    return effective_weight(blocks, layout, None, build)


def scattered_gradients(
    dy: Tensor, x: Tensor | None, want_x: bool, blocks: Tensor, layout: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x where wanted and of the blocks where there is an x, by dense products; dy (T, out)."""
    dx = dy @ _scattered(blocks, layout) if want_x else None
    return dx, None if x is None else _by_tile(dy.t() @ x, layout)[layout.nonzero(as_tuple=True)]


class ScatteredLinearFunction(torch.autograd.Function):
    """One product with the dense weight that the tiles spell: for many or small live tiles."""

    @staticmethod
    def forward(x: Tensor, blocks: Tensor, bias: Tensor | None, layout: Tensor) -> Tensor:
        return F.linear(x, _scattered(blocks, layout), bias)

    @staticmethod
    def setup_context(ctx: _Scattered, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
        x, blocks, _, layout = inputs
        ctx.save_for_backward(x, blocks, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Scattered, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, blocks, layout = ctx.saved_tensors
        x = x if ctx.needs_input_grad[1] else None
        dx, dblocks = scattered_gradients(dy, x, ctx.needs_input_grad[0], blocks, layout)
        return dx, dblocks, dy.sum(0) if ctx.needs_input_grad[2] else None, None


def _traced(x_TCi: Tensor, blocks: Tensor, layout: Tensor) -> Tensor:
    """The same without looking at the layout's values, which tracing hides; holds a copy of x per live tile."""
    order = torch.arange(layout.numel(), 0, -1, device=layout.device)  # the first tile is the largest
    flat = (layout.ne(0).flatten() * order).topk(blocks.shape[0]).indices  # nonzero has no shape in a trace
    row, column = flat // layout.shape[1], flat % layout.shape[1]
    y_nTo = torch.bmm(x_TCi[:, column].transpose(0, 1), blocks.transpose(1, 2))
    y_RTo = y_nTo.new_zeros(layout.shape[0], x_TCi.shape[0], blocks.shape[1]).index_add(0, row, y_nTo)
    return y_RTo.transpose(0, 1)


def check_block_sparse(x: Tensor, blocks: Tensor, layout: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in; raises what `block_sparse_linear` documents."""
    fits = blocks.dim() == 3 and layout.dim() == 2 and x.dim() >= 1 and not layout.is_floating_point()
    fits = fits and x.shape[-1] == layout.shape[1] * blocks.shape[2]
    if not fits or (bias is not None and bias.shape != (layout.shape[0] * blocks.shape[1],)):
        given = describe(x=x, blocks=blocks, layout=layout, bias=bias)
        raise ValueError(
            f"block_sparse_linear: {given} do not fit (layout is {layout.dtype}); want x (..., in), "
            "blocks (live, bo, bi), layout (out / bo, in / bi) bool or integer, bias (out,)"
        )
    return to_compute("block_sparse_linear", x, bias, blocks=blocks)


def block_sparse_linear(x: Tensor, blocks: Tensor, layout: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b for a W of which only some tiles are not zero.

    Gradients for x, blocks and bias; once differentiable outside a compiler. The kernel multiplies live tiles alone;
    so does plain torch, except where tiles are so small or so many that one dense product is quicker. That one's
    weight is then kept on CPU until blocks or layout change or any optimiser steps.

    Args:
        x: (..., in), floating.
        blocks: (live, bo, bi), the live tiles in row-major order of the layout; x's dtype (under autocast any).
        layout: (out / bo, in / bi) bool or integer; a tile is live where it is not zero.
        bias: (out,), x's dtype (under autocast any).

    Returns:
        (..., out), x's dtype (under autocast, autocast's).

    Raises:
        ValueError: shapes or dtypes that do not fit, or a layout with another number of live tiles.

    Source: the deployed form of block movement pruning, Lagunas et al., "Block Pruning For Faster Transformers" (2021).
    """
    x, bias = check_block_sparse(x, blocks, layout, bias)
    blocks = blocks.to(x.dtype)
    x_TCi = rows(x).unflatten(1, (layout.shape[1], blocks.shape[2]))
    shape = (*x.shape[:-1], layout.shape[0] * blocks.shape[1])
    if torch.compiler.is_compiling() or layout.is_meta or type(layout) not in (Tensor, torch.nn.Parameter):
        y = _traced(x_TCi, blocks, layout).reshape(shape)
        return y if bias is None else y + bias
    tiles = _live(layout)
    if len(tiles) != blocks.shape[0]:
        raise ValueError(
            f"block_sparse_linear: layout {tuple(layout.shape)} has {len(tiles)} live tiles, "
            f"blocks {tuple(blocks.shape)}; want one block per live tile"
        )
    if _dense_is_quicker(blocks, layout):
        y = ScatteredLinearFunction.apply(rows(x), blocks, bias, layout)
    else:
        y = BlockSparseLinearFunction.apply(x_TCi, blocks, bias, layout.shape[0], tiles)
    assert isinstance(y, Tensor)
    return y.reshape(shape)
