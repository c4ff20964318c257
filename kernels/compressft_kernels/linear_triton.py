"""Products with a weight that is masked or dequantised in registers, never in memory.

Shapes: x (T, K), y (T, N), weight (N, K). The weight is the left operand of tl.dot, because on sm_90 a transformed
left operand stays in registers, while a right one goes back to shared memory and waits for each product; so every
kernel computes the transpose, [weights, tokens].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, dtypes


@triton.jit
def _nf4_scale(absmax, absmax2, code2, offset, block, inside, DOUBLE: tl.constexpr):
    """The scale of each 64-weight block; with double quantisation itself 8-bit in blocks of 256 around an offset."""
    if DOUBLE:
        place = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        second = tl.load(absmax2 + block // 256, mask=inside, other=0.0)
        scale = tl.load(code2 + place) * second + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    return scale


@triton.jit
def _nf4_tile(
    w, absmax, code, absmax2, code2, offset, n, k0, N, K, bytes_row,
    DOUBLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] dequantised weights of rows n, columns from k0; BLOCK_K and K are multiples of 64."""
    row = n.to(tl.int64)[:, None]
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)
    # Not byte * 2 < K: the compiler would not see that the mask is the same for eight bytes, and load them one by one.
    inside = (n < N)[:, None] & (byte < bytes_row)[None, :]
    pair = tl.load(w + row * bytes_row + byte[None, :], mask=inside, other=0).to(tl.int32)
    # The earlier of two weights lies in the upper half of their byte.
    place = tl.join(pair >> 4, pair & 15).reshape(BLOCK_N, BLOCK_K)
    block = k0 // 64 + tl.arange(0, BLOCK_K // 64)
    scaled = (n < N)[:, None] & (block < K // 64)[None, :]
    scale = _nf4_scale(absmax, absmax2, code2, offset, row * (K // 64) + block[None, :], scaled, DOUBLE)
    # A gather from registers: loads through `code` would be pipelined as one 4-byte copy per weight.
    table = tl.load(code + tl.arange(0, 16))
    value = tl.gather(table, place.reshape(BLOCK_N * BLOCK_K), 0).reshape(BLOCK_N, BLOCK_K // 64, 64)
    return (value * scale[:, :, None]).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _bits_tile(bits, n, k0, N, bytes_row, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] of 0 and 1 from (N, bytes_row) bytes, least significant bit first.

    What the last byte of a row holds beyond the weight's last column is not masked here.
    """
    byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    # bytes_row is an argument of the kernel: computed from K, what it is a multiple of would be lost.
    inside = (n < N)[:, None] & (byte < bytes_row)[None, :]
    eight = tl.load(bits + n.to(tl.int64)[:, None] * bytes_row + byte[None, :], mask=inside, other=0).to(tl.int32)
    # One load per byte, spread afterwards: gathering a byte per weight would be eight loads.
    return ((eight[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _weight_tile(
    w, gate, absmax, code, absmax2, code2, offset, threshold, o0, r0, OUT, SUM, w_o, w_r, gate_o, gate_r,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, TURNED: tl.constexpr, MASKED_OUT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[BLOCK_O, BLOCK_R] of the effective weight from o0, r0, in COMPUTE: OUT outputs, SUM the dimension summed over.

    Multiples of the block sizes, which the loads of bytes need: from the indices the compiler would not know them.
    TURNED: the output runs over the weight's columns (the gradient of x), so what is packed along them is transposed.
    MASKED_OUT: apply the mask; without it, the bare weight (for the scores' gradient).
    """
    o = o0 + tl.arange(0, BLOCK_O)
    r = r0 + tl.arange(0, BLOCK_R)
    inside = (o < OUT)[:, None] & (r < SUM)[None, :]
    far = o.to(tl.int64)[:, None]
    if WEIGHT == "dense":
        tile = tl.load(w + far * w_o + r.to(tl.int64)[None, :] * w_r, mask=inside, other=0.0)
    elif TURNED:
        tile = _nf4_tile(
            w, absmax, code, absmax2, code2, offset, r, o0, SUM, OUT, w_r, WEIGHT == "nf4_double", BLOCK_R, BLOCK_O
        )
        tile = tl.trans(tile)
    else:
        tile = _nf4_tile(
            w, absmax, code, absmax2, code2, offset, o, r0, OUT, SUM, w_o, WEIGHT == "nf4_double", BLOCK_O, BLOCK_R
        )
    if MASKED_OUT:
        if MASK == "scores":
            score = tl.load(gate + far * gate_o + r.to(tl.int64)[None, :] * gate_r, mask=inside, other=0.0)
            tile = tl.where(score > threshold, tile, 0.0)
        elif MASK == "bits":
            if TURNED:
                bit = tl.trans(_bits_tile(gate, r, o0, SUM, gate_r, BLOCK_R, BLOCK_O))
            else:
                bit = _bits_tile(gate, o, r0, OUT, gate_o, BLOCK_O, BLOCK_R)
            tile = tl.where(bit != 0, tile, 0.0)
    return tile.to(COMPUTE)


@triton.jit
def _product_kernel(
    x, w, gate, absmax, code, absmax2, code2, offset, bias, y, threshold,
    T, OUT, SUM, x_row, w_o, w_r, gate_o, gate_r,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, TURNED: tl.constexpr, BIAS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y (T, OUT) = x (T, SUM) weight^T + bias; with SPLIT > 1 its sums part by part, (SPLIT, T, OUT), without bias."""
    across, down = tl.cdiv(T, BLOCK_T), tl.cdiv(OUT, BLOCK_O)
    split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(SUM, BLOCK_R), SPLIT)
    for tile in range(tl.program_id(0), across * down, tl.num_programs(0)):
        # GROUP weight tiles share each token tile while it is in L2.
        band = tile // (GROUP * across)
        height = tl.minimum(down - band * GROUP, GROUP)
        o0 = (band * GROUP + (tile % (GROUP * across)) % height) * BLOCK_O
        t = ((tile % (GROUP * across)) // height) * BLOCK_T + tl.arange(0, BLOCK_T)
        o = o0 + tl.arange(0, BLOCK_O)
        x_t = x + t.to(tl.int64)[None, :] * x_row
        acc = tl.zeros((BLOCK_O, BLOCK_T), ACC)
        for r0 in range(split * steps * BLOCK_R, tl.minimum((split + 1) * steps * BLOCK_R, SUM), BLOCK_R):
            a = _weight_tile(
                w, gate, absmax, code, absmax2, code2, offset, threshold, o0, r0, OUT, SUM, w_o, w_r, gate_o, gate_r,
                WEIGHT, MASK, TURNED, True, COMPUTE, BLOCK_O, BLOCK_R,
            )  # fmt: skip
            r = r0 + tl.arange(0, BLOCK_R)
            b = tl.load(x_t + r[:, None], mask=(r < SUM)[:, None] & (t < T)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            acc += tl.load(bias + o, mask=o < OUT, other=0.0).to(ACC)[:, None]
        place = split.to(tl.int64) * T * OUT + t.to(tl.int64)[None, :] * OUT + o[:, None]
        tl.store(y + place, acc.to(y.dtype.element_ty), mask=(o < OUT)[:, None] & (t < T)[None, :])


@triton.jit
def _gradient_kernel(
    x, dy, w, gate, absmax, code, absmax2, code2, offset, dgate, dweight, threshold,
    T, N, K, x_row, dy_row, w_n, w_k, gate_n, gate_k,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, SCORES: tl.constexpr, WEIGHTS: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """d = dy^T x in registers; d * weight into dgate (SCORES), d * mask into dweight (WEIGHTS).

    With SPLIT > 1 neither: the sums of each part of T go to dweight as (SPLIT, N, K).
    """
    across, down = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    band = tile // (GROUP * across)
    height = tl.minimum(down - band * GROUP, GROUP)
    n0 = (band * GROUP + (tile % (GROUP * across)) % height) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    k0 = ((tile % (GROUP * across)) // height) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    steps = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLIT)
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for t0 in range(split * steps * BLOCK_T, tl.minimum((split + 1) * steps * BLOCK_T, T), BLOCK_T):
        t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        a = tl.load(dy + t[None, :] * dy_row + n[:, None], mask=(n < N)[:, None] & (t < T)[None, :], other=0.0)
        b = tl.load(x + t[:, None] * x_row + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    inside = (n < N)[:, None] & (k < K)[None, :]
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    if SPLIT > 1:
        tl.store(dweight + split.to(tl.int64) * N * K + place, acc, mask=inside)
    else:
        if SCORES:
            bare = _weight_tile(
                w, gate, absmax, code, absmax2, code2, offset, threshold, n0, k0, N, K, w_n, w_k, gate_n, gate_k,
                WEIGHT, MASK, False, False, ACC, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            tl.store(dgate + place, (acc * bare).to(dgate.dtype.element_ty), mask=inside)
        if WEIGHTS:
            if MASK == "scores":
                score = tl.load(gate + n.to(tl.int64)[:, None] * gate_n + k[None, :] * gate_k, mask=inside, other=0.0)
                acc = tl.where(score > threshold, acc, 0.0)
            elif MASK == "bits":
                acc = tl.where(_bits_tile(gate, n, k0, N, gate_n, BLOCK_N, BLOCK_K) != 0, acc, 0.0)
            tl.store(dweight + place, acc.to(dweight.dtype.element_ty), mask=inside)


@triton.jit
def _materialise_kernel(
    w, gate, absmax, code, absmax2, code2, offset, out, threshold, N, K, w_n, w_k, gate_n, gate_k,
    WEIGHT: tl.constexpr, MASK: tl.constexpr, MASKED_OUT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N, K), the effective weight (MASKED_OUT) or the bare one."""
    n0 = tl.program_id(0) * BLOCK_N
    k0 = tl.program_id(1) * BLOCK_K
    tile = _weight_tile(
        w, gate, absmax, code, absmax2, code2, offset, threshold, n0, k0, N, K, w_n, w_k, gate_n, gate_k,
        WEIGHT, MASK, False, MASKED_OUT, COMPUTE, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out + place, tile.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


def _weight_arguments(
    weight: Tensor, quant: list[Tensor], columns: int
) -> tuple[str, tuple[Tensor | None, ...], tuple[int, int]]:
    """WEIGHT, the pointers (weight and quantisation tables) and the strides (of rows, of columns)."""
    if not quant:
        return "dense", (weight, *[None] * 5), (weight.stride(0), weight.stride(1))
    if len(quant) == 2:
        return "nf4", (weight, *quant, None, None, None), (columns // 2, 1)
    return "nf4_double", (weight, *quant), (columns // 2, 1)


def _mask_arguments(gate: Tensor | None) -> tuple[str, tuple[int, int]]:
    """MASK and the strides of the gate; packed bits are contiguous, and a row's bytes are their stride."""
    if gate is None:
        return "none", (0, 0)
    return ("bits", (gate.shape[1], 1)) if gate.dtype == torch.uint8 else ("scores", (gate.stride(0), gate.stride(1)))


def _split(tiles: int, steps: int, programs: int) -> int:
    """Into how many parts (a power of two) each sum is cut so that few tiles keep the device busy."""
    parts = 1
    while parts * 2 * tiles <= programs and parts * 4 <= steps and parts < 16:
        parts *= 2
    return parts


def product(
    x: Tensor, weight: Tensor, quant: list[Tensor], gate: Tensor | None, threshold: float, bias: Tensor | None,
    size: tuple[int, int], config: Mapping[str, int], programs: int, turned: bool = False,
) -> Tensor:  # fmt: skip
    """x (T, K) times the effective weight (N, K) transposed, or with `turned` x (T, N) times it.

    Args:
        quant: [] for a dense weight; [absmax, code] or [absmax, code, absmax2, code2, offset] for packed NF4.
        gate: scores (N, K), packed bits (N, ceil(K / 8)) uint8, or None.
        size: (N, K).
        programs: blocks that the device runs at a time.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    kind, pointers, strides = _weight_arguments(weight, quant, size[1])
    mask, gate_strides = _mask_arguments(gate)
    rows, out, inner = x.shape[0], *(reversed(size) if turned else size)
    if turned:
        strides, gate_strides = strides[::-1], gate_strides[::-1]
    tiles = cdiv(rows, config["BLOCK_T"]) * cdiv(out, config["BLOCK_O"])
    split = _split(tiles, cdiv(inner, config["BLOCK_R"]), programs)
    parts = split > 1
    y = x.new_empty((split, rows, out) if parts else (rows, out), dtype=accumulator(x.dtype) if parts else x.dtype)
    launch(
        _product_kernel, (min(tiles, programs), split),
        x, pointers[0], gate, *pointers[1:], None if parts else bias, y, threshold,
        rows, out, inner, x.stride(0), *strides, *gate_strides,
        WEIGHT=kind, MASK=mask, TURNED=turned, BIAS=bias is not None and not parts, SPLIT=split,
        **dtypes(x.dtype), **config,
    )  # fmt: skip
    if not parts:
        return y
    total = y.sum(0)
    return (total if bias is None else total.add_(bias)).to(x.dtype)


def gradients(
    x: Tensor, dy: Tensor, weight: Tensor, quant: list[Tensor], gate: Tensor | None, threshold: float,
    config: Mapping[str, int], programs: int, scores_wanted: bool, weight_wanted: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(gradient of the scores, gradient of the weight), each (N, K) or None where not wanted."""
    x = x if x.stride(1) == 1 else x.contiguous()
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    size = (dy.shape[1], x.shape[1])
    kind, pointers, strides = _weight_arguments(weight, quant, size[1])
    mask, gate_strides = _mask_arguments(gate)
    tiles = cdiv(size[0], config["BLOCK_N"]) * cdiv(size[1], config["BLOCK_K"])
    dscores = dweight = parts = None
    split = _split(tiles, cdiv(x.shape[0], config["BLOCK_T"]), programs)
    if split > 1:
        parts = x.new_empty((split, *size), dtype=accumulator(x.dtype))
    else:
        dscores = x.new_empty(size, dtype=gate.dtype) if scores_wanted and gate is not None else None
        dweight = x.new_empty(size, dtype=weight.dtype) if weight_wanted else None
    launch(
        _gradient_kernel, (tiles, split),
        x, dy, pointers[0], gate, *pointers[1:], dscores, parts if split > 1 else dweight, threshold,
        x.shape[0], *size, x.stride(0), dy.stride(0), *strides, *gate_strides,
        WEIGHT=kind, MASK=mask, SCORES=scores_wanted, WEIGHTS=weight_wanted, SPLIT=split, **dtypes(x.dtype), **config,
    )  # fmt: skip
    if parts is not None:
        total = parts.sum(0)
        if weight_wanted:
            ones = torch.ones((1, 1), dtype=total.dtype, device=x.device).expand(size)
            mask_values = materialise(ones, [], gate, threshold, size, total.dtype)
            dweight = (total * mask_values).to(weight.dtype)
        if scores_wanted:
            assert gate is not None
            dscores = total.mul_(materialise(weight, quant, None, 0.0, size, total.dtype)).to(gate.dtype)
    return dscores, dweight


def materialise(
    weight: Tensor, quant: list[Tensor], gate: Tensor | None, threshold: float, size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The effective weight (N, K) in `dtype`, for a product by cuBLAS."""
    kind, pointers, strides = _weight_arguments(weight, quant, size[1])
    mask, gate_strides = _mask_arguments(gate)
    out = weight.new_empty(size, dtype=dtype)
    block_n, block_k = 16, 128
    launch(
        _materialise_kernel, (cdiv(size[0], block_n), cdiv(size[1], block_k)),
        pointers[0], gate, *pointers[1:], out, threshold, *size, *strides, *gate_strides,
        WEIGHT=kind, MASK=mask, MASKED_OUT=True, COMPUTE=dtypes(dtype)["COMPUTE"], BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4,
    )  # fmt: skip
    return out
