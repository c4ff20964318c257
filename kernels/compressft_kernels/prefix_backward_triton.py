"""Attention over a shared trained prefix and every row's own keys, in one pass: the backward.

Three kernels: dq (over the keys of both kinds, as in the forward), dk and dv of the own keys (over the query tiles of
the group's heads), dk and dv of the prefix (over all query tiles of the whole batch, in parts that are added up
afterwards in a fixed order). The latter two compute the transposed scores, [keys, queries], so that p and ds are the
left operands of their products and stay in registers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, dtypes, power_of_two
from compressft_kernels.prefix_triton import LOG2E, own_keys, rows_of, seen_bounds, seen_by, tile_of, unit


@triton.jit
def _late_zero(lse, size):
    """0 (no lse is -inf), which is known where it is called and not before.

    Added to a row's number, it keeps what follows from that number (the offsets of the rows to store) from being
    computed ahead of the loops and holding registers through them.
    """
    return tl.where(tl.load(lse, mask=size > 0, other=0.0, volatile=True) == float("-inf"), 1, 0)


@triton.jit
def _query_step(
    dq, q, do, lse, delta, k, k_row, v, v_row, n0, end, seen,
    SCALE: tl.constexpr, MASKED: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq / scale + ds k over the keys n0.. of the matrix at k; `seen` of them, per row, are visible."""
    keys = tile_of(k, k_row, n0, end, MASKED, BLOCK_N, D, BLOCK_D)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    p = tl.exp2(s * (SCALE * LOG2E) - lse[:, None])
    if MASKED:
        p = tl.where((n0 + tl.arange(0, BLOCK_N))[None, :] < seen[:, None], p, 0.0)
    values = tile_of(v, v_row, n0, end, MASKED, BLOCK_N, D, BLOCK_D)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(COMPUTE), keys, dq, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _query_kernel(
    do, q, k, v, prefix_k, prefix_v, lengths, o, lse, delta, dq, T, S, P, G, kv_heads,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, pk_h, pk_p, pv_h, pv_p, o_b, o_h, o_t,
    dq_b, dq_h, dq_t, dq_d,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WANTED: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = sum(o * do) of one tile of stacked rows of one (batch row, key head) and, if WANTED, its dq."""
    rows = G * T
    tiles = tl.cdiv(rows, BLOCK_M)
    # The last rows see the most keys: they start first.
    r0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles
    b = (head // kv_heads).to(tl.int64)
    h = (head % kv_heads).to(tl.int64)
    r = r0 + tl.arange(0, BLOCK_M)
    place, inside = rows_of(r, rows, T, do_h, do_t, D, BLOCK_D)
    slopes = tl.load(do + b * do_b + h * G * do_h + place, mask=inside, other=0.0)
    place, inside = rows_of(r, rows, T, o_h, o_t, D, BLOCK_D)
    outputs = tl.load(o + b * o_b + h * G * o_h + place, mask=inside, other=0.0)
    sums = tl.sum(outputs.to(ACC) * slopes.to(ACC), 1)
    flat = head.to(tl.int64) * rows + r
    tl.store(delta + flat, sums, mask=r < rows)
    if WANTED:
        keys = own_keys(lengths, b, S, LENGTHS)
        seen = seen_by(r % T, keys, S, T, CAUSAL)
        least, most = seen_bounds(r0, rows, keys, S, T, CAUSAL, BLOCK_M)
        k += b * k_b + h * k_h
        v += b * v_b + h * v_h
        prefix_k += h * pk_h
        prefix_v += h * pv_h
        place, inside = rows_of(r, rows, T, q_h, q_t, D, BLOCK_D)
        queries = tl.load(q + b * q_b + h * G * q_h + place, mask=inside, other=0.0)
        row_lse = tl.load(lse + flat, mask=r < rows, other=float("inf"))
        acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
        # The same two loops as in the forward.
        shared = P // BLOCK_N
        whole = least // BLOCK_N
        for j in range(0, shared + whole):
            ahead = j < shared
            n0 = tl.where(ahead, j, j - shared) * BLOCK_N
            acc = _query_step(
                acc, queries, slopes, row_lse, sums, tl.where(ahead, prefix_k, k), tl.where(ahead, pk_p, k_s),
                tl.where(ahead, prefix_v, v), tl.where(ahead, pv_p, v_s), n0, 0, seen,
                SCALE, False, COMPUTE, ACC, PRECISION, BLOCK_N, D, BLOCK_D,
            )  # fmt: skip
        rest = tl.where(P % BLOCK_N > 0, 1, 0)
        for j in range(0, rest + tl.cdiv(most, BLOCK_N) - whole):
            ahead = j < rest
            n0 = tl.where(ahead, shared, whole + j - rest) * BLOCK_N
            acc = _query_step(
                acc, queries, slopes, row_lse, sums, tl.where(ahead, prefix_k, k), tl.where(ahead, pk_p, k_s),
                tl.where(ahead, prefix_v, v), tl.where(ahead, pv_p, v_s), n0, tl.where(ahead, P, S),
                tl.where(ahead, P, seen), SCALE, True, COMPUTE, ACC, PRECISION, BLOCK_N, D, BLOCK_D,
            )  # fmt: skip
        r += _late_zero(lse, rows)
        d = tl.arange(0, BLOCK_D)
        place = (r // T).to(tl.int64) * dq_h + (r % T).to(tl.int64) * dq_t
        place = dq + b * dq_b + h * G * dq_h + place[:, None] + d[None, :] * dq_d
        tl.store(place, (acc * SCALE).to(dq.dtype.element_ty), mask=(r < rows)[:, None] & (d < D)[None, :])


@triton.jit
def _key_step(
    dk, dv, k, v, q, q_t, do, do_t, lse, delta, t0, n, ahead, T,
    SCALE: tl.constexpr, MASKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, COMPUTE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk / scale + ds^T q and dv + p^T do over one head's queries t0..; MASKED: query t sees the keys n < ahead + t.

    Keys that nobody sees are not masked: what they gather stays in their own rows, which are zeroed when stored.
    """
    t = t0 + tl.arange(0, BLOCK_M)
    queries = tile_of(q, q_t, t0, T, True, BLOCK_M, D, BLOCK_D)
    s = tl.dot(k, tl.trans(queries), input_precision=PRECISION, out_dtype=ACC)
    p = tl.exp2(s * (SCALE * LOG2E) - tl.load(lse + t, mask=t < T, other=float("inf"))[None, :])
    if MASKED:
        p = tl.where(n[:, None] < (ahead + t)[None, :], p, 0.0)
    slopes = tile_of(do, do_t, t0, T, True, BLOCK_M, D, BLOCK_D)
    if DV:
        dv = tl.dot(p.to(COMPUTE), slopes, dv, input_precision=PRECISION, out_dtype=ACC)
    if DK:
        dp = tl.dot(v, tl.trans(slopes), input_precision=PRECISION, out_dtype=ACC)
        ds = p * (dp - tl.load(delta + t, mask=t < T, other=0.0)[None, :])
        dk = tl.dot(ds.to(COMPUTE), queries, dk, input_precision=PRECISION, out_dtype=ACC)
    return dk, dv


@triton.jit
def _store_keys(acc, out, n0, keys, S, row, column, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of S keys from n0; zeros from the valid ones' end on, whatever they gathered."""
    n = n0 + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    acc = tl.where((n < keys)[:, None], acc, 0.0).to(out.dtype.element_ty)
    place = out + n0.to(tl.int64) * row + tl.arange(0, BLOCK_N)[:, None] * row + d[None, :] * column
    tl.store(place, acc, mask=(n < S)[:, None] & (d < D)[None, :])


@triton.jit
def _own_kernel(
    do, q, k, v, lengths, lse, delta, dk, dv, T, S, G, kv_heads,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, dk_b, dk_h, dk_s, dk_d, dv_b, dv_h, dv_s, dv_d,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of one (batch row, key head)'s own keys."""
    tiles = tl.cdiv(S, BLOCK_N)
    n0 = (tl.program_id(0) % tiles) * BLOCK_N
    head = tl.program_id(0) // tiles
    b = (head // kv_heads).to(tl.int64)
    h = (head % kv_heads).to(tl.int64)
    n = n0 + tl.arange(0, BLOCK_N)
    keys = own_keys(lengths, b, S, LENGTHS)
    key_tile = tile_of(k + b * k_b + h * k_h, k_s, n0, S, True, BLOCK_N, D, BLOCK_D)
    value_tile = tile_of(v + b * v_b + h * v_h, v_s, n0, S, True, BLOCK_N, D, BLOCK_D)
    q += b * q_b + h * G * q_h
    do += b * do_b + h * G * do_h
    lse += head.to(tl.int64) * G * T
    delta += head.to(tl.int64) * G * T
    # Of a head's query tiles, those before `first` see none of these keys, those from `clear` on see them all.
    steps = tl.cdiv(T, BLOCK_M)
    steps = tl.where(n0 < keys, steps, 0)
    first = n0 * 0
    clear = n0 * 0
    if CAUSAL:
        first = tl.minimum(tl.maximum(n0 - (S - T), 0) // BLOCK_M, steps)
        clear = tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - (S - T), 0), BLOCK_M), steps)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if CAUSAL:
        for i in tl.range(0, G * (clear - first), disable_licm=True):
            g = (i // (clear - first)).to(tl.int64)
            t0 = (first + i % (clear - first)) * BLOCK_M
            dk_acc, dv_acc = _key_step(
                dk_acc, dv_acc, key_tile, value_tile, q + g * q_h, q_t, do + g * do_h, do_t, lse + g * T,
                delta + g * T, t0, n, S - T + 1, T,
                SCALE, True, DK, DV, COMPUTE, ACC, PRECISION, BLOCK_M, D, BLOCK_D,
            )  # fmt: skip
    for i in tl.range(0, G * (steps - clear), disable_licm=True):
        g = (i // (steps - clear)).to(tl.int64)
        t0 = (clear + i % (steps - clear)) * BLOCK_M
        dk_acc, dv_acc = _key_step(
            dk_acc, dv_acc, key_tile, value_tile, q + g * q_h, q_t, do + g * do_h, do_t, lse + g * T,
            delta + g * T, t0, n, 0, T, SCALE, False, DK, DV, COMPUTE, ACC, PRECISION, BLOCK_M, D, BLOCK_D,
        )  # fmt: skip
    n0 += _late_zero(lse, G * T)
    if DK:
        place = dk + b * dk_b + h * dk_h
        _store_keys(dk_acc * SCALE, place, n0, keys, S, dk_s, dk_d, BLOCK_N, D, BLOCK_D)
    if DV:
        place = dv + b * dv_b + h * dv_h
        _store_keys(dv_acc, place, n0, keys, S, dv_s, dv_d, BLOCK_N, D, BLOCK_D)


@triton.jit
def _prefix_kernel(
    do, q, prefix_k, prefix_v, lse, delta, dk, dv, B, T, P, G, kv_heads,
    do_b, do_h, do_t, q_b, q_h, q_t, pk_h, pk_p, pv_h, pv_p,
    SCALE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One part's sums of dk and dv (parts, Hkv, P, D) for one tile of one key head's prefix."""
    tiles = tl.cdiv(P, BLOCK_N)
    n0 = (tl.program_id(0) % tiles) * BLOCK_N
    h = (tl.program_id(0) // tiles).to(tl.int64)
    key_tile = tile_of(prefix_k + h * pk_h, pk_p, n0, P, True, BLOCK_N, D, BLOCK_D)
    value_tile = tile_of(prefix_v + h * pv_h, pv_p, n0, P, True, BLOCK_N, D, BLOCK_D)
    n = n0 + tl.arange(0, BLOCK_N)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    # Every query of the batch sees the whole prefix: no masks, and equal shares.
    steps = tl.cdiv(T, BLOCK_M)
    share = tl.cdiv(B * G * steps, tl.num_programs(1))
    start = tl.program_id(1) * share
    for i in tl.range(start, tl.minimum(start + share, B * G * steps), disable_licm=True):
        t0 = (i % steps) * BLOCK_M
        b = (i // steps // G).to(tl.int64)
        head = h * G + i // steps % G
        flat = (b * kv_heads * G + head) * T
        dk_acc, dv_acc = _key_step(
            dk_acc, dv_acc, key_tile, value_tile, q + b * q_b + head * q_h, q_t, do + b * do_b + head * do_h, do_t,
            lse + flat, delta + flat, t0, n, 0, T,
            SCALE, False, DK, DV, COMPUTE, ACC, PRECISION, BLOCK_M, D, BLOCK_D,
        )  # fmt: skip
    n += _late_zero(lse, B * G * T)
    d = tl.arange(0, BLOCK_D)
    inside = (n < P)[:, None] & (d < D)[None, :]
    place = ((tl.program_id(1) * kv_heads + h) * P + n)[:, None] * D + d[None, :]
    if DK:
        tl.store(dk + place, dk_acc * SCALE, mask=inside)
    if DV:
        tl.store(dv + place, dv_acc, mask=inside)


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, o: Tensor, lse: Tensor,
    causal: bool, lengths: Tensor | None, scale: float, config_dq: Mapping[str, int], config_dkv: Mapping[str, int],
    config_prefix: Mapping[str, int], wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of q, k, v, prefix_k and prefix_v; None for those that are not wanted.

    Args:
        do: (B, Hq, T, D), q's dtype: the gradient of the output.
        o, lse: what the forward returned.
        config_dq, config_dkv: BLOCK_M (queries), BLOCK_N (keys), num_warps, num_stages.
        config_prefix: the same and PROGRAMS, about how many blocks share the prefix's gradients; the order in which
            these are added up depends on it and on the shapes alone.
        wanted: which of the five gradients to compute.

    Returns:
        dq, dk, dv: their operand's dtype and, where it is dense, its strides. dprefix_k and dprefix_v: contiguous,
        summed over the batch in float32 (float64), in their operand's dtype.
    """
    want_q, want_k, want_v, want_pk, want_pv = wanted
    dq = torch.empty_like(q) if want_q else None
    dk = torch.empty_like(k) if want_k else None
    dv = torch.empty_like(v) if want_v else None
    prefix_dtypes = (prefix_k.dtype, prefix_v.dtype)
    do, q, k, v, o = unit(do), unit(q), unit(k), unit(v), unit(o)
    prefix_k, prefix_v = unit(prefix_k.to(q.dtype)), unit(prefix_v.to(q.dtype))
    batch, heads, queries, width = q.shape
    kv_heads, keys, size = k.shape[1], k.shape[2], prefix_k.shape[1]
    group = heads // kv_heads
    causal = causal and queries > 1
    common = {"SCALE": scale, "D": width, "BLOCK_D": power_of_two(width), **dtypes(q.dtype)}
    q_strides, k_strides, v_strides, do_strides = (x.stride()[:3] for x in (q, k, v, do))
    prefix_strides = (*prefix_k.stride()[:2], *prefix_v.stride()[:2])
    delta = torch.empty_like(lse)
    if want_q or want_k or want_pk:
        launch(
            _query_kernel, (cdiv(group * queries, config_dq["BLOCK_M"]) * batch * kv_heads,),
            do, q, k, v, prefix_k, prefix_v, lengths, o, lse, delta, dq, queries, keys, size, group, kv_heads,
            *do_strides, *q_strides, *k_strides, *v_strides, *prefix_strides, *o.stride()[:3],
            *(dq.stride() if dq is not None else (0, 0, 0, 0)),
            CAUSAL=causal, LENGTHS=lengths is not None, WANTED=want_q, **common, **config_dq,
        )  # fmt: skip
    if want_k or want_v:
        launch(
            _own_kernel, (cdiv(keys, config_dkv["BLOCK_N"]) * batch * kv_heads,),
            do, q, k, v, lengths, lse, delta, dk, dv, queries, keys, group, kv_heads,
            *do_strides, *q_strides, *k_strides, *v_strides,
            *(dk.stride() if dk is not None else (0, 0, 0, 0)), *(dv.stride() if dv is not None else (0, 0, 0, 0)),
            CAUSAL=causal, LENGTHS=lengths is not None, DK=want_k, DV=want_v, **common, **config_dkv,
        )  # fmt: skip
    dprefix_k = dprefix_v = None
    if want_pk or want_pv:
        options = {name: value for name, value in config_prefix.items() if name != "PROGRAMS"}
        tiles = cdiv(size, options["BLOCK_N"]) * kv_heads
        steps = batch * group * cdiv(queries, options["BLOCK_M"])
        parts = max(1, min(cdiv(config_prefix["PROGRAMS"], max(1, tiles)), steps))
        shape = (parts, kv_heads, size, width)
        sums_k, sums_v = (
            q.new_empty(shape, dtype=accumulator(q.dtype)) if want else None for want in (want_pk, want_pv)
        )
        launch(
            _prefix_kernel, (tiles, parts),
            do, q, prefix_k, prefix_v, lse, delta, sums_k, sums_v, batch, queries, size, group, kv_heads,
            *do_strides, *q_strides, *prefix_strides, DK=want_pk, DV=want_pv, **common, **options,
        )  # fmt: skip
        dprefix_k = sums_k.sum(0).to(prefix_dtypes[0]) if sums_k is not None else None
        dprefix_v = sums_v.sum(0).to(prefix_dtypes[1]) if sums_v is not None else None
    return dq, dk, dv, dprefix_k, dprefix_v
