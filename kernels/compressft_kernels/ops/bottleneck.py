"""`adapter` as a custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, TypeVarTuple

import torch
from torch import Tensor

from compressft_kernels import dispatch, reference
from compressft_kernels.kept import Kept
from compressft_kernels.nf4 import NF4, dense
from compressft_kernels.ops.fallback import attempt, without_autocast
from compressft_kernels.reference.bottleneck import Norm, adapter_gradients, check_adapter
from compressft_kernels.reference.operands import autocast_dtype, rows

Tensors = TypeVarTuple("Tensors")

# Shapes: x (T, d), down_weight (r, d), up_weight (out, r), gamma and beta (d,).
OPERANDS = (
    "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? gamma, Tensor? beta, "
    "str activation, float scale, bool residual_is_x, float eps"
)


def _configuration(kernel: str, x: Tensor, down_weight: Tensor, up_weight: Tensor) -> dict[str, int]:
    width = max(x.shape[1], up_weight.shape[0])
    facts = {"rows": x.shape[0], "bytes": x.element_size(), "d": width, "r": down_weight.shape[0]}
    return dispatch.configuration(kernel, dispatch.entries(x.device), **facts)


def forward(
    x: Tensor, residual: Tensor | None, save: bool,
    down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, activation: str, scale: float, residual_is_x: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (T, out), x's dtype promoted with the residual's, and what backward needs where `save`, else empty tensors:

    the pre-activation z (T, r), and mean and rstd (T,) of the norm. By the twin they are zeros, which backward by the
    twin does not read.
    """

    def kernel() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from compressft_kernels import adapter_triton as kernels

        config = _configuration("adapter", x, down_weight, up_weight)
        return kernels.forward(
            x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual, residual_is_x, gamma, beta,
            eps, save, config,
        )  # fmt: skip

    def twin() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down, down_b, up, up_b, g, b = _cast(x.dtype, down_weight, down_bias, up_weight, up_bias, gamma, beta)
        norm = None if g is None or b is None else (g, b, eps)
        added = x if residual_is_x else residual
        with without_autocast(x):
            y = reference.adapter(
                x, down, down_b, up, up_b, activation=activation, scale=scale, residual=added, norm=norm
            )
        z, mean, rstd = _saved(x, down_weight, gamma, save)
        return y.contiguous(), z.zero_(), mean.zero_(), rstd.zero_()

    return attempt("adapter", x.device, kernel, twin)


def _cast(dtype: torch.dtype, *tensors: *Tensors) -> tuple[*Tensors]:
    # One for each that was given, which no type says of a generator.
    return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in tensors)  # type: ignore[return-value]


def _saved(x: Tensor, down_weight: Tensor, gamma: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like those that forward saves: z, mean and rstd."""
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = x.shape[0] if save and gamma is not None else 0
    return (
        x.new_empty((x.shape[0], down_weight.shape[0]) if save else (0,)),
        x.new_empty(length, dtype=statistics),
        x.new_empty(length, dtype=statistics),
    )


def backward(
    dy: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, wanted: list[bool],
    down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, activation: str, scale: float, residual_is_x: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, down weight, down bias, up weight, up bias, gamma and beta where wanted, else empty tensors."""
    operands = (x, down_weight, down_bias, up_weight, up_bias, gamma, beta)

    def kernel() -> Sequence[Tensor | None]:
        from compressft_kernels import adapter_backward_triton as kernels

        configs = (_configuration(name, x, down_weight, up_weight) for name in ("adapter_rows", "adapter_weights"))
        size = (x.shape[0], x.shape[1], up_weight.shape[0])
        configs = kernels.shares(size, x.element_size(), *configs, programs=dispatch.programs(x.device))
        return kernels.backward(
            dy, x, z, mean, rstd, *operands[1:], activation, scale, residual_is_x, kernels.Wanted(*wanted), *configs
        )

    def twin() -> Sequence[Tensor | None]:
        down, bias, up, g, b = _cast(x.dtype, down_weight, down_bias, up_weight, gamma, beta)
        found = adapter_gradients(dy, x, down, bias, up, g, b, eps, activation, scale, residual_is_x)
        pairs = zip(found, operands, wanted, strict=True)
        return [None if t is None or g is None or not want else g.to(t.dtype).contiguous() for g, t, want in pairs]

    found = attempt("adapter", dy.device, kernel, twin)
    dx, *rest = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, rest[0], rest[1], rest[2], rest[3], rest[4], rest[5]


adapter_forward = torch.library.custom_op(
    "compressft::adapter",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? residual, bool save, {OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor)",
)(forward)
adapter_backward = torch.library.custom_op(
    "compressft::adapter_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor z, Tensor mean, Tensor rstd, bool[] wanted, {OPERANDS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)(backward)


@adapter_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, save: bool,
    down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None, gamma: Tensor | None,
    *_: object,
):  # fmt: skip
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((x.shape[0], up_weight.shape[0]), dtype=y_dtype), *_saved(x, down_weight, gamma, save)


@adapter_backward.register_fake
def _(
    dy: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, wanted: list[bool],
    down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None, gamma: Tensor | None,
    beta: Tensor | None, *_: object,
):  # fmt: skip
    like = (x, down_weight, down_bias, up_weight, up_bias, gamma, beta)
    return tuple(
        dy.new_empty(t.shape, dtype=t.dtype) if want and t is not None else dy.new_empty(0)
        for t, want in zip(like, wanted, strict=True)
    )


# x, residual, save, the weights with their biases, gamma, beta, and eps, activation, scale and residual_is_x.
_Inputs: TypeAlias = tuple[
    Tensor, Tensor | None, bool, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None,
    float, str, float, bool,
]  # fmt: skip


class _Context(Kept, Protocol):
    # x, z, mean, rstd and the weights.
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, *tuple[Tensor | None, ...]]
    settings: list[float | str]


def _setup(ctx: _Context, inputs: _Inputs, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, _, down_weight, down_bias, up_weight, up_bias, gamma, beta, *ctx.settings = inputs
    _, z, mean, rstd = output
    ctx.mark_non_differentiable(z, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, z, mean, rstd, down_weight, down_bias, up_weight, up_bias, gamma, beta)


def _backward(ctx: _Context, dy: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    x, z, mean, rstd, *weights = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in (0, 3, 4, 5, 6, 7, 8)]
    found = adapter_backward(dy.to(x.dtype), x, z, mean, rstd, wanted, *weights, *ctx.settings)
    found = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
    residual = dy if ctx.needs_input_grad[1] else None
    return found[0], residual, None, *found[1:], None, None, None, None


adapter_forward.register_autograd(_backward, setup_context=_setup)


def adapter(
    x: Tensor,
    down_weight: Tensor | NF4,
    down_bias: Tensor | None,
    up_weight: Tensor | NF4,
    up_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    operands = (x, down_weight, down_bias, up_weight, up_bias)
    dtype = autocast_dtype(x) or x.dtype
    if not dispatch.runs_triton("adapter", x, dtype, r=sum(down_weight.shape[:1])):
        return reference.adapter(*operands, activation=activation, scale=scale, residual=residual, norm=norm)
    down_weight, up_weight = dense(down_weight, dtype), dense(up_weight, dtype)
    operands = (x, down_weight, down_bias, up_weight, up_bias)
    check_adapter(*operands, activation, residual, norm)
    gamma, beta, eps = norm or (None, None, 0.0)
    tensors = [t for t in (*operands, residual, gamma, beta) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    # Under autocast the product is of rounded x, the residual is x as it was.
    residual_is_x = residual is x and x.dtype == dtype
    given = None if residual is None or residual_is_x else rows(residual)
    y, *_ = adapter_forward(
        rows(x.to(dtype)), given, save, down_weight, down_bias, up_weight, up_bias, gamma, beta, activation,
        float(scale), residual_is_x, eps,
    )  # fmt: skip
    return y.view(*x.shape[:-1], up_weight.shape[0])


adapter.__doc__ = reference.adapter.__doc__
