"""`masked_linear` and `packed_linear`: one custom operator over dense or NF4 weights, scores or packed bits.

The operators are for devices that `dispatch` gives a kernel; elsewhere the public functions call the twins.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft_kernels import dispatch, reference
from compressft_kernels.kept import Kept
from compressft_kernels.nf4 import NF4
from compressft_kernels.ops.fallback import attempt
from compressft_kernels.reference.gated import effective, parts, weight_gradients
from compressft_kernels.reference.masked import check_masked
from compressft_kernels.reference.operands import autocast_dtype, rows
from compressft_kernels.reference.packed import check_packed

# Shapes: x (T, in), weight (out, in) or NF4's bytes with its tables, gate: scores, bits or none. The tables are five
# arguments and no list: an operator with a list of tensors flattens and rebuilds its arguments at every call.
OPERANDS = (
    "Tensor weight, Tensor? gate, float threshold, int[] size, "
    "Tensor? absmax, Tensor? code, Tensor? absmax2, Tensor? code2, Tensor? offset"
)


def _name(gate: Tensor | None) -> str:
    return "masked_linear" if gate is not None and gate.is_floating_point() else "packed_linear"


def _runs_triton(x: Tensor, quant: bool, gate: Tensor | None) -> bool:
    if gate is not None and gate.dtype == torch.float64 and not dispatch.interpreted():
        return False  # the kernel compares with the threshold in float32
    return dispatch.runs_triton(_name(gate), x, autocast_dtype(x) or x.dtype, columns=sum(x.shape[-1:]), nf4=quant)


def _scratch(x: Tensor, quant: list[Tensor]) -> bool:
    """Whether the weight is built once, for cuBLAS, instead of in registers: many rows, or no tensor cores to feed."""
    name = "scratch_rows_nf4" if quant else "scratch_rows_dense"
    if x.dtype == torch.float32 and not dispatch.tf32_allowed():
        name = "scratch_rows_float32"
    least = dispatch.limit(name, dispatch.entries(x.device))
    return least is not None and x.shape[0] >= least


def _configuration(kernel: str, x: Tensor, weight: Tensor, quant: list[Tensor]) -> dict[str, int]:
    return dispatch.configuration(
        kernel,
        dispatch.entries(x.device),
        rows=x.shape[0],
        bytes=x.element_size(),
        weight="nf4" if quant else "dense",
        weight_bytes=0 if quant else weight.element_size(),
    )


def forward(
    x: Tensor, bias: Tensor | None, weight: Tensor, gate: Tensor | None, threshold: float, size: list[int],
    *tables: Tensor | None,
) -> Tensor:  # fmt: skip
    """(T, out), x's dtype."""
    quant, shape = [t for t in tables if t is not None], (size[0], size[1])

    def kernel() -> Tensor:
        from compressft_kernels import linear_triton as kernels

        if _scratch(x, quant):
            return F.linear(x, kernels.materialise(weight, quant, gate, threshold, shape, x.dtype), bias)
        config = _configuration("product", x, weight, quant)
        return kernels.product(x, weight, quant, gate, threshold, bias, shape, config, dispatch.programs(x.device))

    def twin() -> Tensor:
        return F.linear(x, effective(weight, quant, gate, threshold, shape, x.dtype), bias)

    return attempt(_name(gate), x.device, kernel, twin)


def backward(
    dy: Tensor, x: Tensor | None, wanted: list[bool], weight: Tensor, gate: Tensor | None, threshold: float,
    size: list[int], *tables: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x (T, in), the weight and the scores (out, in) where wanted, else empty tensors."""
    quant, shape = [t for t in tables if t is not None], (size[0], size[1])
    name = _name(gate)

    def x_by_kernel() -> Tensor:
        from compressft_kernels import linear_triton as kernels

        if _scratch(dy, quant):
            return dy @ kernels.materialise(weight, quant, gate, threshold, shape, dy.dtype)
        config = _configuration("product_turned", dy, weight, quant)
        operands = (dy, weight, quant, gate, threshold, None, shape, config, dispatch.programs(dy.device))
        return kernels.product(*operands, turned=True)

    def x_by_twin() -> Tensor:
        return dy @ effective(weight, quant, gate, threshold, shape, dy.dtype)

    dx = attempt(name, dy.device, x_by_kernel, x_by_twin) if wanted[0] else None
    dweight = dscores = None
    if x is not None:

        def weights_by_kernel() -> tuple[Tensor | None, Tensor | None]:
            from compressft_kernels import linear_triton as kernels

            config = _configuration("gradient", dy, weight, quant)
            operands = (x, dy, weight, quant, gate, threshold, config, dispatch.programs(dy.device))
            dscores, dweight = kernels.gradients(*operands, scores_wanted=wanted[2], weight_wanted=wanted[1])
            return dweight, dscores

        def weights_by_twin() -> tuple[Tensor | None, Tensor | None]:
            return weight_gradients(dy, x, (wanted[1], wanted[2]), weight, quant, gate, threshold, shape)

        if dispatch.left_to_libraries("gradient", dy, dy.dtype):
            dweight, dscores = weights_by_twin()
        else:
            dweight, dscores = attempt(name, dy.device, weights_by_kernel, weights_by_twin)
    dx, dweight, dscores = (dy.new_empty(0) if g is None else g for g in (dx, dweight, dscores))
    return dx, dweight, dscores


gated_linear = torch.library.custom_op(
    "compressft::gated_linear", mutates_args=(), schema=f"(Tensor x, Tensor? bias, {OPERANDS}) -> Tensor"
)(forward)
gated_linear_backward = torch.library.custom_op(
    "compressft::gated_linear_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? x, bool[] wanted, {OPERANDS}) -> (Tensor, Tensor, Tensor)",
)(backward)


@gated_linear.register_fake
def _(
    x: Tensor, bias: Tensor | None, weight: Tensor, gate: Tensor | None, threshold: float, size: list[int], *_: object
):
    return x.new_empty(x.shape[0], size[0])


@gated_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor | None, wanted: list[bool], weight: Tensor, gate: Tensor | None, threshold: float,
    size: list[int], *_: object,
):  # fmt: skip
    want_x, want_weight, want_scores = wanted
    return (
        dy.new_empty((dy.shape[0], size[1]) if want_x else (0,)),
        dy.new_empty(tuple(size), dtype=weight.dtype) if want_weight else dy.new_empty(0),
        dy.new_empty(tuple(size), dtype=gate.dtype) if want_scores and gate is not None else dy.new_empty(0),
    )


# x, bias, weight, gate, threshold, size and the tables of a quantised weight.
_Inputs: TypeAlias = tuple[Tensor, Tensor | None, Tensor, Tensor | None, float, list[int], *tuple[Tensor | None, ...]]


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor | None, Tensor, Tensor | None, *tuple[Tensor | None, ...]]
    threshold: float
    size: list[int]
    wanted: list[bool]


def _setup(ctx: _Context, inputs: _Inputs, output: Tensor) -> None:
    x, _, weight, gate, ctx.threshold, ctx.size, *tables = inputs
    ctx.wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    ctx.save_for_backward(x if ctx.wanted[1] or ctx.wanted[2] else None, weight, gate, *tables)


def _backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate, *tables = ctx.saved_tensors
    found = gated_linear_backward(dy, x, ctx.wanted, weight, gate, ctx.threshold, ctx.size, *tables)
    dx, dweight, dscores = (g if wanted else None for g, wanted in zip(found, ctx.wanted, strict=True))
    dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
    return dx, dbias, dweight, dscores, *[None] * 7


gated_linear.register_autograd(_backward, setup_context=_setup)


def _apply(x: Tensor, weight: Tensor | NF4, gate: Tensor | None, threshold: float, bias: Tensor | None) -> Tensor:
    stored, quant, size = parts(weight)
    if gate is not None and gate.dtype == torch.uint8:
        gate = gate.contiguous()
    tables = [*quant, *[None] * (5 - len(quant))]
    y = gated_linear(rows(x), bias, stored, gate, threshold, [*size], *tables)
    return y.view(*x.shape[:-1], size[0])


def masked_linear(
    x: Tensor, weight: Tensor | NF4, scores: Tensor, *, threshold: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    if not _runs_triton(x, isinstance(weight, NF4), scores):
        return reference.masked_linear(x, weight, scores, threshold=threshold, bias=bias)
    x, bias = check_masked(x, weight, scores, bias)
    # The twin compares in the scores' dtype.
    rounded = torch.tensor(threshold, dtype=scores.dtype).item()
    return _apply(x, weight, scores, rounded, bias)


def packed_linear(x: Tensor, weight: Tensor | NF4, bits: Tensor | None, *, bias: Tensor | None = None) -> Tensor:
    if not _runs_triton(x, isinstance(weight, NF4), bits):
        return reference.packed_linear(x, weight, bits, bias=bias)
    x, bias = check_packed(x, weight, bits, bias)
    return _apply(x, weight, bits, 0.0, bias)


masked_linear.__doc__ = reference.masked_linear.__doc__
packed_linear.__doc__ = reference.packed_linear.__doc__
