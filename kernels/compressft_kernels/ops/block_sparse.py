"""`block_sparse_linear` as a custom operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from compressft_kernels import dispatch, reference
from compressft_kernels.kept import Kept
from compressft_kernels.ops.fallback import attempt, without_autocast
from compressft_kernels.reference.block_sparse import check_block_sparse, scattered_gradients
from compressft_kernels.reference.operands import autocast_dtype, rows

if TYPE_CHECKING:
    from compressft_kernels.block_sparse_triton import Index

# Shapes: x (T, C bi), blocks (n, bo, bi), layout (R, C) with n live tiles.
OPERANDS = "Tensor blocks, Tensor layout"
# layout -> (version, storage, index): a layout changes rarely, and its index takes a dozen small kernels.
_indexes = WeakIdKeyDictionary()


def _index(layout: Tensor, n: int) -> Index:
    """Where the live tiles are, kept while the layout is unchanged.

    Raises:
        ValueError: a layout with another number of live tiles than n (not looked at while a CUDA graph is captured).
    """
    from compressft_kernels.block_sparse_triton import index

    if layout.is_meta or (layout.is_cuda and torch.cuda.is_current_stream_capturing()):
        return index(layout, n)  # what a graph allocates belongs to the graph
    stamp = None if layout.is_inference() else (layout._version, layout.data_ptr(), n)
    kept = _indexes.get(layout)
    if kept is not None and kept[0] == stamp:
        return kept[1]
    live = int(layout.count_nonzero())
    if live != n:
        raise ValueError(
            f"block_sparse_linear: layout {tuple(layout.shape)} has {live} live tiles, blocks have {n}; "
            "want one block per live tile"
        )
    found = index(layout, n)
    if stamp is not None:
        _indexes[layout] = (stamp, found)
    return found


def _configuration(kernel: str, x: Tensor, out: int, inner: int) -> dict[str, int]:
    """out and inner: the sides of a tile, as the product reads it."""
    facts = {"rows": x.shape[0], "bytes": x.element_size(), "out": out, "inner": inner}
    return dispatch.configuration(kernel, dispatch.entries(x.device), **facts)


def _shares(x: Tensor, blocks: Tensor, config: dict[str, int]) -> dict[str, int]:
    """TILES of a row to a program, about COLUMNS wide, and SPLIT (a power of two) parts of the tokens to fill all."""
    config = dict(config)
    config["TILES"] = max(1, config.pop("COLUMNS") // blocks.shape[2])
    busy = 2 * dispatch.programs(x.device) // max(1, blocks.shape[0] // config["TILES"])
    most = x.shape[0] // (4 * config["BLOCK_T"])
    return config | {"SPLIT": 1 << max(1, min(busy, most, 16)).bit_length() - 1}


def forward(x: Tensor, bias: Tensor | None, blocks: Tensor, layout: Tensor) -> Tensor:
    """y (T, R bo), x's dtype."""

    def kernel() -> Tensor:
        from compressft_kernels import block_sparse_triton as kernels

        size = (layout.shape[0], layout.shape[1])
        config = _configuration("block_sparse", x, blocks.shape[1], blocks.shape[2])
        return kernels.forward(x, blocks, _index(layout, blocks.shape[0]), size, bias, config)

    def twin() -> Tensor:
        added = None if bias is None else bias.to(x.dtype)
        with without_autocast(x):
            return reference.block_sparse_linear(x, blocks.to(x.dtype), layout, bias=added)

    return attempt("block_sparse_linear", x.device, kernel, twin)


def backward(dy: Tensor, x: Tensor | None, wanted: list[bool], blocks: Tensor, layout: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and the blocks where wanted, else empty tensors."""

    def kernel() -> tuple[Tensor | None, Tensor | None]:
        from compressft_kernels import block_sparse_triton as kernels

        size, index = (layout.shape[0], layout.shape[1]), _index(layout, blocks.shape[0])
        dx = dblocks = None
        if wanted[0]:
            config = _configuration("block_sparse_turned", dy, blocks.shape[2], blocks.shape[1])
            dx = kernels.backward_x(dy, blocks, index, size, config)
        if x is not None:
            config = _configuration("block_sparse_blocks", dy, blocks.shape[1], blocks.shape[2])
            config = _shares(dy, blocks, config)
            dblocks = kernels.backward_blocks(dy, x, blocks, index, size, config)
        return dx, dblocks

    def twin() -> tuple[Tensor | None, Tensor | None]:
        dx, dblocks = scattered_gradients(dy, x, wanted[0], blocks.to(dy.dtype), layout)
        return dx, None if dblocks is None else dblocks.to(blocks.dtype)

    dx, dblocks = attempt("block_sparse_linear", dy.device, kernel, twin)
    return dy.new_empty(0) if dx is None else dx, dy.new_empty(0) if dblocks is None else dblocks


block_sparse = torch.library.custom_op(
    "compressft::block_sparse_linear", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {OPERANDS}) -> Tensor"
)(forward)
block_sparse_backward = torch.library.custom_op(
    "compressft::block_sparse_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? x, bool[] wanted, {OPERANDS}) -> (Tensor, Tensor)",
)(backward)


@block_sparse.register_fake
def _(x: Tensor, bias: Tensor | None, blocks: Tensor, layout: Tensor):
    return x.new_empty(x.shape[0], layout.shape[0] * blocks.shape[1])


@block_sparse_backward.register_fake
def _(dy: Tensor, x: Tensor | None, wanted: list[bool], blocks: Tensor, layout: Tensor):
    dx = dy.new_empty((dy.shape[0], layout.shape[1] * blocks.shape[2]) if wanted[0] else (0,))
    return dx, dy.new_empty(0) if x is None else dy.new_empty(blocks.shape, dtype=blocks.dtype)


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor | None, Tensor, Tensor]


def _setup(ctx: _Context, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor], output: Tensor) -> None:
    x, _, blocks, layout = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, blocks, layout)


def _backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    x, blocks, layout = ctx.saved_tensors
    dx, dblocks = block_sparse_backward(dy, x, wanted, blocks, layout)
    dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
    return dx if wanted[0] else None, dbias, dblocks if wanted[1] else None, None


block_sparse.register_autograd(_backward, setup_context=_setup)


def block_sparse_linear(x: Tensor, blocks: Tensor, layout: Tensor, *, bias: Tensor | None = None) -> Tensor:
    dtype = autocast_dtype(x) or x.dtype
    tile = tuple(blocks.shape[1:])
    if not dispatch.runs_triton("block_sparse_linear", x, dtype, tile=tile):
        return reference.block_sparse_linear(x, blocks, layout, bias=bias)
    x, bias = check_block_sparse(x, blocks, layout, bias)
    y = block_sparse(rows(x), bias, blocks, layout)
    return y.view(*x.shape[:-1], y.shape[-1])


block_sparse_linear.__doc__ = reference.block_sparse_linear.__doc__
