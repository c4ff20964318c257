"""`prefix_attention` as a custom operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from compressft_kernels import dispatch, reference
from compressft_kernels.kept import Kept
from compressft_kernels.ops.fallback import attempt, without_autocast
from compressft_kernels.reference.operands import autocast_dtype
from compressft_kernels.reference.prefix import check_prefix, prefix_gradients

# Shapes: q (B, Hq, T, D), k and v (B, Hkv, S, D), prefix_k and prefix_v (Hkv, P, D), lengths (B,) int64.
OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? lengths, bool causal, float scale"


def _configuration(kernel: str, q: Tensor, k: Tensor) -> dict[str, int]:
    stacked = q.shape[2] * (q.shape[1] // k.shape[1])  # a group's query heads share one read of the keys
    facts = {"queries": stacked, "head_dim": q.shape[3], "bytes": q.element_size()}
    return dispatch.configuration(kernel, dispatch.entries(q.device), **facts)


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Tensor | None, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o like q, and the softmax's log2-denominators (B, Hq, T), of which the twin makes zeros and reads none."""

    def kernel() -> tuple[Tensor, Tensor]:
        from compressft_kernels import prefix_triton as kernels

        config = _configuration("prefix", q, k)
        return kernels.forward(q, k, v, prefix_k, prefix_v, causal, lengths, scale, config)

    def twin() -> tuple[Tensor, Tensor]:
        operands = (q, k, v, prefix_k, prefix_v)
        with without_autocast(q):
            o = reference.prefix_attention(*operands, causal=causal, lengths=lengths, scale=scale)
        return torch.empty_like(q).copy_(o), _like_lse(q).zero_()

    return attempt("prefix_attention", q.device, kernel, twin)


def _like_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def backward(
    do: Tensor, o: Tensor, lse: Tensor, wanted: list[bool],
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Tensor | None, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, prefix_k and prefix_v where wanted, else empty tensors."""
    operands = (q, k, v, prefix_k, prefix_v)

    def kernel() -> Sequence[Tensor | None]:
        from compressft_kernels import prefix_backward_triton as kernels

        dq, own, front = (_configuration(name, q, k) for name in ("prefix_dq", "prefix_dkv", "prefix_dprefix"))
        flags = (wanted[0], wanted[1], wanted[2], wanted[3], wanted[4])
        return kernels.backward(do, *operands, o, lse, causal, lengths, scale, dq, own, front, flags)

    def twin() -> Sequence[Tensor | None]:
        found = prefix_gradients(do, *operands, causal, lengths, scale)
        # As the kernels lay them out: those of q, k and v like their operands.
        own = (torch.empty_like(t).copy_(g) for t, g in zip((q, k, v), found, strict=False))
        pairs = zip((*own, found[3], found[4]), operands, wanted, strict=True)
        return [g.to(t.dtype) if want else None for g, t, want in pairs]

    found = attempt("prefix_attention", do.device, kernel, twin)
    dq, dk, dv, dpk, dpv = (q.new_empty(0) if gradient is None else gradient for gradient in found)
    return dq, dk, dv, dpk, dpv


prefix_forward = torch.library.custom_op(
    "compressft::prefix_attention", mutates_args=(), schema=f"({OPERANDS}) -> (Tensor, Tensor)"
)(forward)
prefix_backward = torch.library.custom_op(
    "compressft::prefix_attention_backward",
    mutates_args=(),
    schema=f"(Tensor do, Tensor o, Tensor lse, bool[] wanted, {OPERANDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)(backward)


@prefix_forward.register_fake
def _(q: Tensor, *_: object):
    return torch.empty_like(q), _like_lse(q)


@prefix_backward.register_fake
def _(
    do: Tensor, o: Tensor, lse: Tensor, wanted: list[bool],
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *_: object,
):  # fmt: skip
    own = [torch.empty_like(t) if want else t.new_empty(0) for t, want in zip((q, k, v), wanted[:3], strict=True)]
    prefixes = ((prefix_k, wanted[3]), (prefix_v, wanted[4]))
    return (*own, *(t.new_empty(t.shape) if want else q.new_empty(0) for t, want in prefixes))


# q, k, v, prefix_k, prefix_v, lengths, causal and scale.
_Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, float]


class _Context(Kept, Protocol):
    # o, lse and the tensors that were given.
    saved_tensors: tuple[Tensor, Tensor, *tuple[Tensor | None, ...]]
    causal: bool
    scale: float


def _setup(ctx: _Context, inputs: _Inputs, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: _Context, do: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if do is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:5])
    o, lse, *tensors = ctx.saved_tensors
    found = prefix_backward(do, o, lse, wanted, *tensors, ctx.causal, ctx.scale)
    return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), None, None, None


prefix_forward.register_autograd(_backward, setup_context=_setup)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    dtype = autocast_dtype(q) or q.dtype
    if not dispatch.runs_triton("prefix_attention", q, dtype, head_dim=sum(q.shape[-1:])):
        return reference.prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal, lengths=lengths, scale=scale)
    check_prefix(q, k, v, prefix_k, prefix_v, lengths)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    # The kernels read them as they lie in memory: an expanded tensor has one value there.
    lengths = None if lengths is None else lengths.contiguous()
    o, _ = prefix_forward(q.to(dtype), k.to(dtype), v.to(dtype), prefix_k, prefix_v, lengths, causal, scale)
    return o


prefix_attention.__doc__ = reference.prefix_attention.__doc__
