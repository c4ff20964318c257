"""Attention with trained keys and values in front of every row's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft_kernels.reference.operands import describe


def _own_visible(q: Tensor, k: Tensor, causal: bool, lengths: Tensor | None) -> Tensor | None:
    """How many of its row's own keys each query sees, (B or 1, 1, T or 1, 1) int64 >= 0; None where all do."""
    queries, keys = q.shape[2], k.shape[2]
    visible = None if lengths is None else lengths.view(-1, 1, 1, 1)
    if causal and queries > 1:
        up_to = torch.arange(keys - queries + 1, keys + 1, device=q.device).view(1, 1, -1, 1)
        visible = up_to if visible is None else torch.minimum(visible, up_to)
    return None if visible is None else visible.clamp(min=0)


def check_prefix(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, lengths: Tensor | None) -> None:
    want = "want q (B, Hq, T, D), k and v (B, Hkv, S, D), prefix_k and prefix_v (Hkv, P, D), lengths (B,) int64"
    fits = q.dim() == 4 and k.dim() == 4 and prefix_k.dim() == 3 and v.shape == k.shape
    fits = fits and prefix_v.shape == prefix_k.shape and k.shape[1] == prefix_k.shape[0]
    fits = fits and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] == prefix_k.shape[2]
    fits = fits and (lengths is None or (lengths.shape == q.shape[:1] and lengths.dtype == torch.int64))
    if fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0:
        return  # before any message is put together: that would take longer than the check
    given = describe(q=q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v, lengths=lengths)
    if not fits:
        dtype = "" if lengths is None else f" (lengths are {lengths.dtype})"
        raise ValueError(f"prefix_attention: {given} do not fit{dtype}; {want}")
    raise ValueError(f"prefix_attention: {given}: Hq {q.shape[1]} is no multiple of Hkv {k.shape[1]}; {want}")


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
    """softmax(q [prefix_k; k]^T * scale) [prefix_v; v] per head, the prefix shared by the whole batch.

    Every query sees the whole prefix. A query that sees no key at all (nothing visible and P = 0) gives zeros and
    gets and gives zero gradients. Gradients for q, k, v, prefix_k and prefix_v; P = 0 is plain attention.

    Args:
        q: (B, Hq, T, D), floating.
        k, v: (B, Hkv, S, D), q's dtype; Hq is a multiple of Hkv, and query head h reads key head h // (Hq / Hkv).
        prefix_k, prefix_v: (Hkv, P, D), any floating dtype (taken in k's).
        causal: query t sees its row's own keys up to S - T + t, so that the last query sees all of them.
        lengths: (B,) int64, how many of the S own keys are valid; the rest is padding on the right. Values outside
            0..S mean 0 or S.
        scale: 1 / sqrt(D) if None.

    Returns:
        (B, Hq, T, D), q's dtype.

    Raises:
        ValueError: shapes that do not fit, named in the message.

    Source: Li & Liang, "Prefix-Tuning" (ACL 2021), on each layer's keys and values.
    """
    check_prefix(q, k, v, prefix_k, prefix_v, lengths)
    size, queries, keys = prefix_k.shape[1], q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if size == 0 and torch.is_grad_enabled() and (prefix_k.requires_grad or prefix_v.requires_grad):
        # Joining nothing in front gives the empty prefix its empty gradients.
        k, v = (
            torch.cat([p.to(t.dtype).expand(q.shape[0], -1, -1, -1), t], 2) for p, t in ((prefix_k, k), (prefix_v, v))
        )
    if causal and lengths is None and size == 0 and queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    visible = _own_visible(q, k, causal, lengths)
    if size:
        k = torch.cat([prefix_k.to(k.dtype).expand(q.shape[0], -1, -1, -1), k], dim=2)
        v = torch.cat([prefix_v.to(v.dtype).expand(q.shape[0], -1, -1, -1), v], dim=2)
    if visible is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    mask = torch.arange(-size, keys, device=q.device) < visible  # (B or 1, 1, T or 1, P + S)
    if size:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    # A query that sees nothing is let see everything, and its result dropped: no NaN in either direction.
    blind = visible == 0
    o = F.scaled_dot_product_attention(q, k, v, mask | blind, scale=scale, enable_gqa=grouped)
    return o.masked_fill(blind, 0.0)


def prefix_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool,
    lengths: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `prefix_attention`'s q, k, v, prefix_k and prefix_v, in float32 at least.

    Without autograd, which records nothing within an operator. One row of the batch at a time: all of its scores are
    in memory.
    """
    total = torch.promote_types(q.dtype, torch.float32)
    do, q, k, v, prefix_k, prefix_v = (t.to(total) for t in (do, q, k, v, prefix_k, prefix_v))
    heads, size, queries = k.shape[1], prefix_k.shape[1], q.shape[2]
    visible = _own_visible(q, k, causal, lengths)
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    d_prefix_k, d_prefix_v = torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
    for b in range(q.shape[0]):
        # A group's query heads beneath one another: (Hkv, G T, D).
        rows, slopes = (t[b].reshape(heads, -1, t.shape[3]) for t in (q, do))
        keys, values = torch.cat([prefix_k, k[b]], 1), torch.cat([prefix_v, v[b]], 1)
        scores = rows @ keys.mT * scale
        if visible is not None:
            seen = visible[b if visible.shape[0] > 1 else 0].view(-1, 1).expand(queries, 1)
            hidden = torch.arange(-size, k.shape[2], device=q.device) >= seen
            scores.masked_fill_(hidden.repeat(scores.shape[1] // queries, 1), float("-inf"))
        # A query that sees nothing has no probabilities.
        p = scores.softmax(2).nan_to_num_(0.0)
        dp = slopes @ values.mT
        ds = p * (dp - (p * dp).sum(2, keepdim=True)) * scale
        dq[b] = (ds @ keys).view(dq.shape[1:])
        d_keys, d_values = ds.mT @ rows, p.mT @ slopes
        dk[b], dv[b] = d_keys[:, size:], d_values[:, size:]
        d_prefix_k += d_keys[:, :size]
        d_prefix_v += d_values[:, :size]
    return dq, dk, dv, d_prefix_k, d_prefix_v
