"""What PyTorch alone offers for prefix attention: the peers that are more than one line."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft_kernels.kept import Kept

Operands = dict[str, Any]
# name -> (operands -> output, operands -> what it reads besides, or None)
Named = dict[str, tuple[Callable[[Operands], Tensor], Callable[[Operands], Operands] | None]]


def _whole(o: Operands) -> tuple[Tensor, Tensor]:
    """Keys and values behind a copy of the prefix for each row of the batch."""
    batch = o["q"].shape[0]
    return (
        torch.cat([o["prefix_k"].expand(batch, -1, -1, -1), o["k"]], 2),
        torch.cat([o["prefix_v"].expand(batch, -1, -1, -1), o["v"]], 2),
    )


def _grouped(o: Operands) -> bool:
    return o["q"].shape[1] != o["k"].shape[1]


def _visible(o: Operands, causal: bool) -> Tensor | None:
    """(B or 1, 1, T or 1, P + S) bool, which keys each query sees; None where all do."""
    device, size, queries, keys = o["q"].device, o["prefix_k"].shape[1], o["q"].shape[2], o["k"].shape[2]
    place = torch.arange(-size, keys, device=device)
    visible = None
    if causal:
        visible = (place <= torch.arange(keys - queries, keys, device=device)[:, None])[None, None]
    if o["lengths"] is not None:
        within = place < o["lengths"][:, None, None, None]
        visible = within if visible is None else visible & within
    return None if visible is None else visible | (place < 0)


def eager_attention(o: Operands, causal: bool) -> Tensor:
    """Concatenate, multiply, mask, softmax, multiply."""
    q, (k, v), visible = o["q"], _whole(o), _visible(o, causal)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if visible is None:
        return torch.softmax(scores, -1) @ v
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    # A query that sees nothing gives zeros.
    return (torch.softmax(scores, -1) * visible.any(-1, keepdim=True)) @ v


def library_attention(o: Operands, causal: bool) -> Tensor:
    """torch's attention on the concatenated keys, with a mask where it takes one."""
    (k, v), visible = _whole(o), _visible(o, causal)
    if visible is None:
        return F.scaled_dot_product_attention(o["q"], k, v, enable_gqa=_grouped(o))
    blind = ~visible.any(-1, keepdim=True)
    y = F.scaled_dot_product_attention(o["q"], k, v, visible | blind, enable_gqa=_grouped(o))
    return y.masked_fill(blind, 0.0)


def _sdpa(o: Operands, causal: bool) -> Tensor:
    """The same without padding, in the form that torch has its fastest kernels for."""
    from torch.nn.attention.bias import causal_lower_right

    k, v = _whole(o)
    queries = o["q"].shape[2]
    # Lower right: the last query sees all keys, so every query sees the prefix.
    mask = causal_lower_right(queries, k.shape[2]) if causal and queries > 1 else None
    return F.scaled_dot_product_attention(o["q"], k, v, mask, enable_gqa=_grouped(o))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_mask(o: Operands, causal: bool) -> Operands:
    if not causal or o["q"].shape[2] == 1:
        return {"block_mask": None}
    from torch.nn.attention.flex_attention import create_block_mask

    queries, keys, size = o["q"].shape[2], o["k"].shape[2], o["prefix_k"].shape[1]

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + size + keys - queries

    # None: the same for all rows and heads.
    return {"block_mask": create_block_mask(sees, None, None, queries, size + keys, device=o["q"].device)}


def _flex(o: Operands) -> Tensor:
    k, v = _whole(o)
    return _compiled_flex()(o["q"], k, v, block_mask=o["block_mask"], enable_gqa=_grouped(o))


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    causal: bool
    groups: int
    # Of the prefix's call and of the other.
    rest: tuple[list[Tensor], list[Tensor]]


class Merged(torch.autograd.Function):
    """One call on the prefix, one on the own keys, merged by log-sum-exp.

    Backward gives each call's backward the merged output and log-sum-exp, which makes it exact (as ring attention
    does). In the prefix's call the batch is folded into the queries: its keys are then read once and not expanded.
    """

    @staticmethod
    def forward(ctx: _Context, q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, causal: bool) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v, pk, pv = (t.repeat_interleave(groups, -3) for t in (k, v, pk, pv))
        folded = Merged._fold(q)
        parts = [(folded, pk[None], pv[None], False), (q, k, v, causal)]
        (first, first_lse, *first_rest), (second, second_lse, *second_rest) = (_flash(*part) for part in parts)
        first, first_lse = (
            Merged._unfold(first, q.shape[0]),
            Merged._unfold(first_lse[..., None], q.shape[0])[..., 0],
        )
        lse = torch.logaddexp(first_lse, second_lse)
        weights = [(part - lse).exp().unsqueeze(-1).to(q.dtype) for part in (first_lse, second_lse)]
        o = first * weights[0] + second * weights[1]
        ctx.save_for_backward(q, k, v, pk, pv, o, lse)
        ctx.causal, ctx.groups, ctx.rest = causal, groups, (first_rest, second_rest)
        return o

    @staticmethod
    def backward(ctx: _Context, do: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, pk, pv, o, lse = ctx.saved_tensors
        fold = Merged._fold
        far = (fold(do), fold(q), pk[None], pv[None], fold(o), fold(lse[..., None])[..., 0].contiguous())
        dq, dpk, dpv = _flash_backward(*far, False, ctx.rest[0])
        near_dq, dk, dv = _flash_backward(do, q, k, v, o, lse, ctx.causal, ctx.rest[1])
        dq = Merged._unfold(dq, q.shape[0]) + near_dq
        dk, dv, dpk, dpv = (t.unflatten(1, (-1, ctx.groups)).sum(2) for t in (dk, dv, dpk, dpv))
        return dq, dk, dv, dpk[0], dpv[0], None

    @staticmethod
    def _fold(t: Tensor) -> Tensor:
        """(B, H, T, D) as (1, H, B * T, D)."""
        return t.transpose(0, 1).flatten(1, 2)[None]

    @staticmethod
    def _unfold(t: Tensor, batch: int) -> Tensor:
        return t[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> list[Tensor]:
    """[output, log-sum-exp (B, H, T), whatever the backward wants besides]."""
    if q.device.type == "cpu":
        return [*torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)]
    return [*torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)][:8]


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, rest: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return function(do, q, k, v, o, lse, 0.0, causal)
    starts, seed = rest[:4], rest[4:6]
    function = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return function(do, q, k, v, o, lse, *starts, 0.0, causal, *seed)


def attention(causal: bool) -> Named:
    """The peers for a prefix of at least one key, no padding, and as many queries as keys where causal."""

    def merged(o: Operands) -> Tensor:
        several = causal and o["q"].shape[2] > 1
        o_merged = Merged.apply(o["q"], o["k"], o["v"], o["prefix_k"], o["prefix_v"], several)
        assert isinstance(o_merged, Tensor)
        return o_merged

    return {
        "SDPA": (lambda o: _sdpa(o, causal), None),
        "FlexAttention": (_flex, lambda o: _flex_mask(o, causal)),
        "flash twice": (merged, None),
    }
