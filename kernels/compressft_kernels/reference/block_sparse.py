"""A linear layer of which only the live tiles are stored and multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compressft_kernels.reference.operands import describe, rows, to_compute

# Shapes: T rows of x, R x C tiles of (bo, bi), n live. A tile is (its place in `blocks`, its row, its column).
Tile = tuple[int, int, int]


def _live(layout: Tensor) -> list[Tile]:
    return [(place, row, column) for place, (row, column) in enumerate(layout.nonzero().tolist())]


def _along(tiles: list[Tile], axis: int, length: int) -> list[list[Tile]]:
    """The live tiles of every tile row (axis 1) or tile column (axis 2)."""
    lines: list[list[Tile]] = [[] for _ in range(length)]
    for tile in tiles:
        lines[tile[axis]].append(tile)
    return lines


def _take(tensor: Tensor, indices: list[int], dim: int) -> Tensor:
    """tensor's slices at ascending indices along dim: a view where they are adjacent."""
    if indices[-1] - indices[0] + 1 == len(indices):
        return tensor.narrow(dim, indices[0], len(indices))
    return tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


class BlockSparseLinearFunction(torch.autograd.Function):
    """One product per tile row (forward, blocks' gradient) or tile column (x's gradient), over its live tiles."""

    @staticmethod
    def forward(x_TCi: Tensor, blocks: Tensor, lines: int, tiles: list[Tile]) -> Tensor:
        y_TRo = x_TCi.new_zeros(x_TCi.shape[0], lines, blocks.shape[1])
        for row, line in enumerate(_along(tiles, 1, lines)):
            if line:
                x_Tki = _take(x_TCi, [column for _, _, column in line], 1).flatten(1)
                weight = blocks[line[0][0] : line[-1][0] + 1].transpose(0, 1).flatten(1)
                y_TRo[:, row] = x_Tki @ weight.t()
        return y_TRo

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TCi, blocks, _, tiles = inputs
        ctx.save_for_backward(x_TCi, blocks)
        ctx.tiles = tiles

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TRo: Tensor) -> tuple[Tensor | None, ...]:
        x_TCi, blocks = ctx.saved_tensors
        dx_TCi = dblocks = None
        if ctx.needs_input_grad[0]:
            dx_TCi = torch.zeros_like(x_TCi)
            for column, line in enumerate(_along(ctx.tiles, 2, x_TCi.shape[1])):
                if line:
                    dy_Tko = _take(dy_TRo, [row for _, row, _ in line], 1).flatten(1)
                    dx_TCi[:, column] = dy_Tko @ _take(blocks, [place for place, _, _ in line], 0).flatten(0, 1)
        if ctx.needs_input_grad[1]:
            dblocks = torch.empty_like(blocks)
            for row, line in enumerate(_along(ctx.tiles, 1, dy_TRo.shape[1])):
                if line:
                    x_Tki = _take(x_TCi, [column for _, _, column in line], 1).flatten(1)
                    d_oki = (dy_TRo[:, row].t() @ x_Tki).unflatten(1, (len(line), blocks.shape[2]))
                    dblocks[line[0][0] : line[-1][0] + 1] = d_oki.transpose(0, 1)
        return dx_TCi, dblocks, None, None


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
    """y = x W^T + b for a W of which only some tiles are not zero; only those are multiplied.

    Gradients for x, blocks and bias; once differentiable outside a compiler.

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
    if torch.compiler.is_compiling() or layout.is_meta or type(layout) not in (Tensor, torch.nn.Parameter):
        y_TRo = _traced(x_TCi, blocks, layout)
    else:
        tiles = _live(layout)
        if len(tiles) != blocks.shape[0]:
            raise ValueError(
                f"block_sparse_linear: layout {tuple(layout.shape)} has {len(tiles)} live tiles, "
                f"blocks {tuple(blocks.shape)}; want one block per live tile"
            )
        y_TRo = BlockSparseLinearFunction.apply(x_TCi, blocks, layout.shape[0], tiles)
        assert isinstance(y_TRo, Tensor)
    y = y_TRo.reshape(*x.shape[:-1], layout.shape[0] * blocks.shape[1])
    return y if bias is None else y + bias
