"""Attention over a shared trained prefix and every row's own keys, in one pass: the forward.

Shapes: q (B, Hq, T, D), k and v (B, Hkv, S, D), prefix_k and prefix_v (Hkv, P, D). The G = Hq / Hkv query heads of one
key head are stacked to rows r = g * T + t, so that a tile of keys is read once for all of them and a decoding step
(T = 1) fills a tile of queries. Scores are kept in base 2: p = exp2(s * scale * log2(e) - lse).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, dtypes, power_of_two

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def own_keys(lengths, b, S, LENGTHS: tl.constexpr):
    """How many of batch row b's own keys are valid, 0 to S."""
    keys = S
    if LENGTHS:
        keys = tl.maximum(tl.minimum(tl.load(lengths + b), S), 0).to(tl.int32)
    return keys


@triton.jit
def seen_by(t, keys, S, T, CAUSAL: tl.constexpr):
    """How many of `keys` own keys query t sees; for a scalar t and a vector alike."""
    seen = t * 0 + keys
    if CAUSAL:
        seen = tl.maximum(tl.minimum(seen, S - T + 1 + t), 0)
    return seen


@triton.jit
def seen_bounds(r0, rows, keys, S, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """The least and the most own keys that a query of the row tile from r0 sees."""
    last = tl.minimum(r0 + BLOCK_M, rows) - 1
    # A tile that reaches into the next head has that head's first query and its own head's last one.
    within = r0 // T == last // T
    first_t = tl.where(within, r0 % T, 0)
    last_t = tl.where(within, last % T, T - 1)
    return seen_by(first_t, keys, S, T, CAUSAL), seen_by(last_t, keys, S, T, CAUSAL)


@triton.jit
def tile_of(base, row, n0, end, MASKED: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D] of the matrix at `base` from row n0; zeros from row `end` (MASKED) and from column D on."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    place = base + n0.to(tl.int64) * row + n[:, None] * row + d[None, :]
    if MASKED:
        tile = tl.load(place, mask=(n0 + n < end)[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(place)
    else:
        tile = tl.load(place, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def rows_of(r, rows, T, s_h, s_t, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(offsets, mask) of the stacked rows r in a (G, T, D) block with strides s_h, s_t and 1."""
    d = tl.arange(0, BLOCK_D)
    start = (r // T).to(tl.int64) * s_h + (r % T).to(tl.int64) * s_t
    return start[:, None] + d[None, :], (r < rows)[:, None] & (d < D)[None, :]


@triton.jit
def _attend(
    acc, total, top, q, k, k_row, v, v_row, n0, end, seen,
    SCALE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys n0.. of the matrix at k; `seen` of them, per row, are visible."""
    keys = tile_of(k, k_row, n0, end, MASKED, BLOCK_N, D, BLOCK_D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    if MASKED:
        s = tl.where((n0 + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], s * (SCALE * LOG2E), float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
    elif SCALE > 0:
        # The factor goes into the exponent's multiply-add.
        new_top = tl.maximum(top, tl.max(s, 1) * (SCALE * LOG2E))
        p = tl.exp2(s * (SCALE * LOG2E) - new_top[:, None])
    else:
        s = s * (SCALE * LOG2E)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    values = tile_of(v, v_row, n0, end, MASKED, BLOCK_N, D, BLOCK_D)
    acc = tl.dot(p.to(COMPUTE), values, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc, total, new_top


@triton.jit
def _forward_kernel(
    q, k, v, prefix_k, prefix_v, lengths, o, lse, T, S, P, G, kv_heads,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, pk_h, pk_p, pv_h, pv_p, o_b, o_h, o_t, o_d,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of stacked rows of one (batch row, key head)."""
    rows = G * T
    tiles = tl.cdiv(rows, BLOCK_M)
    # The last rows see the most keys: they start first.
    r0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles
    b = (head // kv_heads).to(tl.int64)
    h = (head % kv_heads).to(tl.int64)
    r = r0 + tl.arange(0, BLOCK_M)
    keys = own_keys(lengths, b, S, LENGTHS)
    seen = seen_by(r % T, keys, S, T, CAUSAL)
    least, most = seen_bounds(r0, rows, keys, S, T, CAUSAL, BLOCK_M)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    prefix_k += h * pk_h
    prefix_v += h * pv_h
    place, inside = rows_of(r, rows, T, q_h, q_t, D, BLOCK_D)
    queries = tl.load(q + b * q_b + h * G * q_h + place, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    # Finite, so that a row that has seen nothing yet subtracts no infinities.
    top = tl.full((BLOCK_M,), -3.0e38, ACC)
    # Tiles that every row sees whole, the prefix's first; one loop over both, so that the pipeline never drains.
    shared = P // BLOCK_N
    whole = least // BLOCK_N
    for j in range(0, shared + whole):
        ahead = j < shared
        n0 = tl.where(ahead, j, j - shared) * BLOCK_N
        acc, total, top = _attend(
            acc, total, top, queries, tl.where(ahead, prefix_k, k), tl.where(ahead, pk_p, k_s),
            tl.where(ahead, prefix_v, v), tl.where(ahead, pv_p, v_s), n0, 0, seen,
            SCALE, False, COMPUTE, ACC, PRECISION, BLOCK_N, D, BLOCK_D,
        )  # fmt: skip
    # The prefix's last tile if it is not whole, then the own tiles at the diagonal and at the end.
    rest = tl.where(P % BLOCK_N > 0, 1, 0)
    for j in range(0, rest + tl.cdiv(most, BLOCK_N) - whole):
        ahead = j < rest
        n0 = tl.where(ahead, shared, whole + j - rest) * BLOCK_N
        acc, total, top = _attend(
            acc, total, top, queries, tl.where(ahead, prefix_k, k), tl.where(ahead, pk_p, k_s),
            tl.where(ahead, prefix_v, v), tl.where(ahead, pv_p, v_s), n0, tl.where(ahead, P, S),
            tl.where(ahead, P, seen), SCALE, True, COMPUTE, ACC, PRECISION, BLOCK_N, D, BLOCK_D,
        )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    # Always 0, but known after the loops alone: else the rows' offsets in o would hold registers through them.
    r += tl.where(tl.max(total, 0) < 0.0, 1, 0)
    d = tl.arange(0, BLOCK_D)
    place = (r // T).to(tl.int64) * o_h + (r % T).to(tl.int64) * o_t
    place = o + b * o_b + h * G * o_h + place[:, None] + d[None, :] * o_d
    tl.store(place, acc.to(o.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])
    # Infinite where nothing is seen, so that the backward's exp2(s - lse) is 0 there.
    tl.store(lse + head.to(tl.int64) * rows + r, tl.where(blind, float("inf"), top + tl.log2(total)), mask=r < rows)


def unit(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal: bool, lengths: Tensor | None,
    scale: float, config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q [prefix_k; k]^T * scale) [prefix_v; v] and the logarithm, to base 2, of the softmax's denominator.

    Args:
        prefix_k, prefix_v: (Hkv, P, D), any floating dtype (taken in q's).
        lengths: (B,) int64 or None.
        config: BLOCK_M (stacked query rows), BLOCK_N (keys), num_warps, num_stages.

    Returns:
        o: (B, Hq, T, D), q's dtype and, where q is dense, its strides.
        lse: (B, Hq, T), float32 (float64 for float64): log2(sum of exp2(q k^T * scale * log2(e))) over the keys
            that the query sees, prefix included; +inf where it sees none.
    """
    o = torch.empty_like(q)
    q, k, v = unit(q), unit(k), unit(v)
    # Cast once here, not in every block: both kinds of keys then share one loop.
    prefix_k, prefix_v = unit(prefix_k.to(q.dtype)), unit(prefix_v.to(q.dtype))
    batch, heads, queries, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    lse = q.new_empty((batch, heads, queries), dtype=accumulator(q.dtype))
    launch(
        _forward_kernel, (cdiv(group * queries, config["BLOCK_M"]) * batch * kv_heads,),
        q, k, v, prefix_k, prefix_v, lengths, o, lse, queries, k.shape[2], prefix_k.shape[1], group, kv_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *prefix_k.stride()[:2], *prefix_v.stride()[:2], *o.stride(),
        SCALE=scale, CAUSAL=causal and queries > 1, LENGTHS=lengths is not None, D=width, BLOCK_D=power_of_two(width),
        **dtypes(q.dtype), **config,
    )  # fmt: skip
    return o, lse
