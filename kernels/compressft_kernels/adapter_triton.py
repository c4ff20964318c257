"""The bottleneck adapter's forward in one pass over its rows; LayerNorm is folded into the down projection.

y = residual + scale * (act(norm(x) W_d^T + b_d) W_u^T + b_u). Shapes: x (T, D), W_d (R, D), W_u (OUT, R), y (T, OUT).
Weights are the left operand of tl.dot and tokens its columns, so that sm_90 multiplies by warpgroups for 16 tokens too.

The norm: with G = W_d * gamma, g its row sums and c = W_d beta + b_d,
    z = rstd * (G x - mean * g) + c,
so that one read of x gives its statistics and its product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, activate, dtypes


@triton.jit
def finished(acc, inside):
    """acc, of a product that has ended; `inside` is the loop's own condition, so this costs nothing.

    For loops that use a loaded tile in registers as well as in tl.dot: triton (3.6, 3.7) gives such a tile no buffer
    for the product still in flight and would overwrite what sm_90's is reading. Other products are not in flight from
    registers, and sm_100's, in tensor memory, do not compile with it.
    """
    if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
        acc = tl.where(inside, acc, 0.0)
    return acc


@triton.jit
def _fold_kernel(
    w, bias, gamma, beta, folded, sums, R, D, w_row,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """folded (R, D) = w * gamma in COMPUTE; sums (2, R): the sums of folded's rows, then w beta + bias."""
    r = tl.program_id(0).to(tl.int64)
    g = tl.zeros((BLOCK_D,), ACC)
    c = tl.zeros((BLOCK_D,), ACC)
    for k0 in range(0, D, BLOCK_D):
        k = k0 + tl.arange(0, BLOCK_D)
        row = tl.load(w + r * w_row + k, mask=k < D, other=0.0).to(ACC)
        product = (row * tl.load(gamma + k, mask=k < D, other=0.0).to(ACC)).to(COMPUTE)
        tl.store(folded + r * D + k, product, mask=k < D)
        # Of the rounded weights, so that the mean cancels.
        g += product.to(ACC)
        c += row * tl.load(beta + k, mask=k < D, other=0.0).to(ACC)
    total = tl.sum(c, 0)
    if bias is not None:
        total += tl.load(bias + r).to(ACC)
    tl.store(sums + r, tl.sum(g, 0))
    tl.store(sums + R + r, total)


@triton.jit
def _forward_kernel(
    x, down, down_bias, up, up_bias, residual, sums, y, z, mean, rstd,
    T, D, R, OUT, x_row, down_row, up_row, residual_row, scale, scale_rest, eps: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr, SHIFT: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of y; with NORM, `down` and `sums` are `_fold_kernel`'s."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    alive = t < T
    far = t.to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    x_t = x + far[:, None] * x_row
    acc = tl.zeros((BLOCK_R, BLOCK_T), ACC)
    if NORM:
        # Sums about an element of the row: the variance does not cancel, however large the mean.
        about = tl.load(x + far * x_row, mask=alive, other=0.0).to(ACC)
        first = tl.zeros((BLOCK_T, BLOCK_K // 8), ACC)
        second = tl.zeros((BLOCK_T, BLOCK_K // 8), ACC)
    for k0 in range(0, D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(down + r[:, None] * down_row + k[None, :], mask=(r < R)[:, None] & (k < D)[None, :], other=0.0)
        tile = tl.load(x_t + k[None, :], mask=alive[:, None] & (k < D)[None, :], other=0.0)
        if NORM:
            away = tile.to(ACC) - about[:, None]
            if not EVEN:
                away = tl.where((k < D)[None, :], away, 0.0)
            # Eight neighbours lie in one thread; threads are summed over once, after the loop.
            eight = away.reshape(BLOCK_T, BLOCK_K // 8, 8)
            first += tl.sum(eight, 2)
            second += tl.sum(eight * eight, 2)
            if SHIFT:
                tile = away.to(COMPUTE)
        acc = tl.dot(a, tl.trans(tile), acc, input_precision=PRECISION, out_dtype=ACC)
        if NORM:
            acc = finished(acc, k0 < D)
    if NORM:
        offset = tl.sum(first, 1) / D
        spread = tl.maximum(tl.sum(second, 1) / D - offset * offset, 0.0)
        inverse = 1.0 / tl.sqrt(spread + eps)
        centre = about + offset
        g = tl.load(sums + r, mask=r < R, other=0.0)
        c = tl.load(sums + R + r, mask=r < R, other=0.0)
        acc = (acc - (offset if SHIFT else centre)[None, :] * g[:, None]) * inverse[None, :] + c[:, None]
        if SAVE:
            tl.store(mean + t, centre, mask=alive)
            tl.store(rstd + t, inverse, mask=alive)
    elif down_bias is not None:
        acc += tl.load(down_bias + r, mask=r < R, other=0.0).to(ACC)[:, None]
    if SAVE:
        place = far[None, :] * R + r[:, None]
        tl.store(z + place, acc.to(z.dtype.element_ty), mask=alive[None, :] & (r < R)[:, None])
    h = activate(acc, ACTIVATION).to(COMPUTE)
    factor = tl.cast(scale, ACC) + tl.cast(scale_rest, ACC)
    chunks = tl.cdiv(OUT, BLOCK_O)
    for chunk in range(0, chunks):
        # Backwards: what was read last is still in L2 for the residual.
        o = (chunks - 1 - chunk) * BLOCK_O + tl.arange(0, BLOCK_O)
        inside = alive[:, None] & (o < OUT)[None, :]
        if residual is not None:
            # Ahead of the product, which hides the wait for it.
            skip = tl.load(residual + far[:, None] * residual_row + o[None, :], mask=inside, other=0.0)
        b = tl.load(
            up + o.to(tl.int64)[:, None] * up_row + r[None, :], mask=(o < OUT)[:, None] & (r < R)[None, :], other=0.0
        )
        part = tl.trans(tl.dot(b, h, input_precision=PRECISION, out_dtype=ACC))
        if up_bias is not None:
            part += tl.load(up_bias + o, mask=o < OUT, other=0.0).to(ACC)[None, :]
        part *= factor
        if residual is not None:
            part += skip.to(ACC)
        tl.store(y + far[:, None] * OUT + o[None, :], part.to(y.dtype.element_ty), mask=inside)


def rows(x: Tensor) -> Tensor:
    """x (T, n) with its last dimension contiguous; a stride of 0 over rows may stay."""
    return x if x.stride(1) == 1 else x.contiguous()


def two_parts(value: float) -> tuple[float, float]:
    """(value rounded to float32, the rest): scalars reach a kernel as float32."""
    rounded = ctypes.c_float(value).value
    return rounded, value - rounded


def fold(
    down_weight: Tensor, down_bias: Tensor | None, gamma: Tensor, beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(down_weight * gamma (r, d) in `dtype`, its row sums and down_weight beta + down_bias (2, r))."""
    size, width = down_weight.shape
    folded = down_weight.new_empty((size, width), dtype=dtype)
    sums = down_weight.new_empty((2, size), dtype=accumulator(dtype))
    types = dtypes(dtype)
    launch(
        _fold_kernel, (size,), down_weight, down_bias, gamma, beta, folded, sums, size, width, down_weight.stride(0),
        COMPUTE=types["COMPUTE"], ACC=types["ACC"], BLOCK_D=min(1024, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip
    return folded, sums


def forward(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    activation: str, scale: float, residual: Tensor | None, residual_is_x: bool,
    gamma: Tensor | None, beta: Tensor | None, eps: float, save: bool, config: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y (T, out), z (T, r), mean (T,), rstd (T,)) of x (T, d); what is not saved has no elements.

    Args:
        residual: (T, out) or None; with `residual_is_x`, x itself.
        gamma, beta: (d,), of a LayerNorm applied to x first, or None.
        save: keep z, the pre-activation in x's dtype, and the norm's statistics for `backward`.
        config: BLOCK_T tokens of a program; BLOCK_R, a power of two that holds r; BLOCK_K and BLOCK_O, columns of x
            and of y at a time; num_warps, num_stages.
    """
    x, down_weight, up_weight = rows(x), rows(down_weight), rows(up_weight)
    length, width = x.shape
    out, size = up_weight.shape
    assert config["BLOCK_R"] >= size
    residual = x if residual_is_x else None if residual is None else rows(residual)
    total = accumulator(x.dtype)
    norm = gamma is not None and beta is not None
    y = x.new_empty((length, out), dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    z = x.new_empty((length, size) if save else (0,))
    mean, rstd = (x.new_empty((length,) if save and norm else (0,), dtype=total) for _ in range(2))
    if length == 0:
        return y, z, mean, rstd
    sums = None
    if gamma is not None and beta is not None:
        down, sums = fold(down_weight, down_bias, gamma, beta, x.dtype)
    else:
        # Once here: cast in the kernel, each block of tokens would read twice the bytes.
        down = down_weight.to(x.dtype)
    up = up_weight.to(x.dtype)
    launch(
        _forward_kernel, (cdiv(length, config["BLOCK_T"]),),
        x, down, down_bias, up, up_bias, residual, sums, y, z, mean, rstd,
        length, width, size, out, x.stride(0), down.stride(0), up.stride(0),
        0 if residual is None else residual.stride(0), *two_parts(scale), eps,
        ACTIVATION=activation, NORM=norm, SAVE=save, EVEN=width % config["BLOCK_K"] == 0,
        SHIFT=x.dtype.itemsize >= 4, **dtypes(x.dtype), **config,
    )  # fmt: skip
    return y, z, mean, rstd
