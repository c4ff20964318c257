"""Products with a weight of which only some tiles are stored: no dead tile is read or multiplied.

Shapes: x (T, C bi), y (T, R bo), blocks (n, bo, bi) in row-major order of the layout (R, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, dtypes


class Index(NamedTuple):
    """Where the live tiles are, int32. Read row by row they lie in `blocks` one after the other."""

    row_start: Tensor  # (R + 1): row r holds the tiles row_start[r]:row_start[r + 1] of `blocks`
    column: Tensor  # (n): the column of each
    column_start: Tensor  # (C + 1): the same read column by column
    row: Tensor  # (n)
    place: Tensor  # (n): where each lies in `blocks`


def index(layout: Tensor, n: int) -> Index:
    """The index of a layout (R, C) of n live tiles, on its device and without waiting for it.

    Another number of live tiles gives wrong sums (the caller checks), but no access out of bounds.
    """
    live = layout.ne(0)
    # Not nonzero: its shape would have to be waited for. A stable sort keeps the row-major order.
    flat = live.flatten().argsort(descending=True, stable=True)[:n]
    column = flat % layout.shape[1]
    place = column.argsort(stable=True)
    row_start, column_start = (
        F.pad(live.sum(axis, dtype=torch.int32).cumsum(0, dtype=torch.int32).clamp_(max=n), (1, 0)) for axis in (1, 0)
    )
    row = (flat // layout.shape[1])[place]
    return Index(row_start, column.int(), column_start, row.int(), place.int())


@triton.jit
def _product_kernel(
    x, blocks, start, other, place, bias, y, T, LINES, x_row,
    OUT: tl.constexpr, INNER: tl.constexpr, TURNED: tl.constexpr, BIAS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, TOKENS_LEFT: tl.constexpr,
):  # fmt: skip
    """y (T, LINES OUT): line l is the sum over its live tiles of x's tile `other` times the live tile transposed.

    Lines are tile rows; TURNED: tile columns, their live tiles transposed and found through `place`.
    Not persistent: the device hands out programs as others end, which evens out lines of unequal length.
    """
    # Neighbouring programs take the same tokens, which they share in L2.
    line = tl.program_id(0) % LINES
    t = (tl.program_id(0) // LINES) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.arange(0, OUT)
    r = tl.arange(0, BLOCK_R)
    DEEP: tl.constexpr = INNER // BLOCK_R
    first = tl.load(start + line)
    last = tl.load(start + line + 1)
    tile_o = blocks + o[:, None] + r[None, :] * OUT if TURNED else blocks + o[:, None] * INNER + r[None, :]
    x_t = x + t.to(tl.int64)[None, :] * x_row + r[:, None]
    known = (t < T)[None, :]
    # Each tile's indices are loaded one step ahead: the copies that they address could not start before.
    across = tl.load(other + first, mask=first < last, other=0)
    where = tl.load(place + first, mask=first < last, other=0) if TURNED else first
    acc = tl.zeros((BLOCK_T, OUT), ACC) if TOKENS_LEFT else tl.zeros((OUT, BLOCK_T), ACC)
    # One flat loop over (tile, chunk of it), so that loads run ahead across tiles too.
    for step in range(first * DEEP, last * DEEP):
        r0 = (step % DEEP) * BLOCK_R  # type: ignore[operator]
        a = tl.load(tile_o + (where.to(tl.int64) * (OUT * INNER) + r0 * (OUT if TURNED else 1))).to(COMPUTE)
        b = tl.load(x_t + (across.to(tl.int64) * INNER + r0), mask=known, other=0.0).to(COMPUTE)
        following = (step + 1) // DEEP
        across = tl.load(other + following, mask=following < last, other=0)
        where = tl.load(place + following, mask=following < last, other=0) if TURNED else following
        if TOKENS_LEFT:
            acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    if TOKENS_LEFT:
        acc = tl.trans(acc)
    if BIAS:
        acc += tl.load(bias + line * OUT + o).to(ACC)[:, None]
    out = y + t.to(tl.int64)[None, :] * (LINES * OUT) + (line * OUT + o)[:, None]
    tl.store(out, acc.to(y.dtype.element_ty), mask=known)


@triton.jit
def _blocks_kernel(
    x, dy, row_start, column, dblocks, T, n, C, x_row, dy_row,
    BO: tl.constexpr, BI: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, TILES: tl.constexpr, TILES_LEFT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dblocks (SPLIT, n, BO, BI), a part of T each: TILES live tiles of one row at a time, which share dy's tile."""
    groups = tl.cdiv(C, TILES)
    row = tl.program_id(0) // groups
    split = tl.program_id(1)
    first = tl.load(row_start + row) + (tl.program_id(0) % groups) * TILES
    last = tl.load(row_start + row + 1)
    # Row lengths are not known where the grid is made; what lies behind a row's end has nothing to do.
    if first < last:
        o = tl.arange(0, BO)
        wide = tl.arange(0, TILES * BI)
        tile = first + wide // BI
        live = tile < last
        i = tl.load(column + tile, mask=live, other=0) * BI + wide % BI
        # What lies in one tile is adjacent, which the loaded columns hide from the compiler.
        i = tl.max_contiguous(tl.multiple_of(i, BI), BI)
        acc = tl.zeros((TILES * BI, BO), ACC) if TILES_LEFT else tl.zeros((BO, TILES * BI), ACC)
        t = tl.arange(0, BLOCK_T)
        x_i = x + t.to(tl.int64)[:, None] * x_row + i[None, :]
        dy_o = dy + t.to(tl.int64)[None, :] * dy_row + (row * BO + o)[:, None]
        steps = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLIT)
        for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(T, BLOCK_T))):
            t0 = tl.cast(step, tl.int64) * BLOCK_T
            known = t0 + t < T
            a = tl.load(dy_o + t0 * dy_row, mask=known[None, :], other=0.0).to(COMPUTE)
            b = tl.load(x_i + t0 * x_row, mask=known[:, None] & live[None, :], other=0.0).to(COMPUTE)
            if TILES_LEFT:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if TILES_LEFT:
            acc = tl.trans(acc)
        far = (split.to(tl.int64) * n + tile) * (BO * BI) + wide % BI
        tl.store(dblocks + far[None, :] + o[:, None] * BI, acc.to(dblocks.dtype.element_ty), mask=live[None, :])


def _rows_adjacent(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _product(
    x: Tensor, blocks: Tensor, start: Tensor, other: Tensor, place: Tensor | None, bias: Tensor | None, lines: int,
    config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    x = _rows_adjacent(x)
    out, inner = blocks.shape[1:] if place is None else reversed(blocks.shape[1:])
    y = x.new_empty(x.shape[0], lines * out)
    config = {**config, "BLOCK_R": min(config["BLOCK_R"], inner)}
    launch(
        _product_kernel, (lines * cdiv(x.shape[0], config["BLOCK_T"]),),
        x, blocks.contiguous(), start, other, place, bias, y, x.shape[0], lines, x.stride(0),
        OUT=out, INNER=inner, TURNED=place is not None, BIAS=bias is not None, **dtypes(x.dtype), **config,
    )  # fmt: skip
    return y


def forward(
    x: Tensor, blocks: Tensor, index: Index, size: tuple[int, int], bias: Tensor | None, config: Mapping[str, int]
) -> Tensor:
    """y (T, R bo) = x W^T + bias in x's dtype.

    Args:
        x: (T, C bi), rows of any stride.
        blocks: (n, bo, bi), any floating dtype; bo and bi are 16, 32, 64 or 128.
        index: of the layout; see `index`.
        size: (R, C).
        bias: (R bo,), any floating dtype.
        config: BLOCK_T, BLOCK_R (at most this much of a tile's depth at a time), num_warps, num_stages; TOKENS_LEFT:
            1 puts x left in tl.dot, for tiles with fewer rows than the 64 that sm_90 multiplies at a time.
    """
    return _product(x, blocks, index.row_start, index.column, None, bias, size[0], config)


def backward_x(dy: Tensor, blocks: Tensor, index: Index, size: tuple[int, int], config: Mapping[str, int]) -> Tensor:
    """dx (T, C bi) = dy W in dy's dtype; config as for `forward`."""
    return _product(dy, blocks, index.column_start, index.row, index.place, None, size[1], config)


def backward_blocks(
    dy: Tensor, x: Tensor, blocks: Tensor, index: Index, size: tuple[int, int], config: Mapping[str, int]
) -> Tensor:
    """The live tiles of dy^T x, (n, bo, bi) in the blocks' dtype; of `blocks`, only shape and dtype are used.

    Args:
        config: BLOCK_T, TILES (of one row, taken together), TILES_LEFT (1: x left, as TOKENS_LEFT), SPLIT (parts of
            T, summed afterwards), num_warps, num_stages.
    """
    x, dy = _rows_adjacent(x), _rows_adjacent(dy)
    n, bo, bi = blocks.shape
    split = config["SPLIT"]
    dblocks = x.new_empty((split, n, bo, bi), dtype=accumulator(x.dtype) if split > 1 else blocks.dtype)
    groups = size[0] * cdiv(size[1], config["TILES"])
    launch(
        _blocks_kernel, (groups if n else 0, split),
        x, dy, index.row_start, index.column, dblocks, x.shape[0], n, size[1], x.stride(0), dy.stride(0),
        BO=bo, BI=bi, **dtypes(x.dtype), **config,
    )  # fmt: skip
    return dblocks[0] if split == 1 else dblocks.sum(0).to(blocks.dtype)
