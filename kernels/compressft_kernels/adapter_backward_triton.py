"""The bottleneck adapter's gradients: a kernel over rows and one over weights, chunk by chunk of tokens.

Shapes and the norm's G, g and c as in adapter_triton. Both kernels go over a chunk of rows before the next, so that the
second finds x and dy in L2. With xhat = (x - mean) * rstd and dz the gradient of the pre-activation:
    dx = rstd * (dz G - dz.g / D - xhat * dz.(z - c) / D)
    A = dz^T xhat;  dW_d = A * gamma + db_d beta^T;  dgamma = sum_r W_d * A;  dbeta = W_d^T db_d
The weights' kernel multiplies by x as it is: A = (dz * rstd)^T x - sum_t dz_t rstd_t mean_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from compressft_kernels.adapter_triton import finished, fold, rows, two_parts
from compressft_kernels.launch_triton import cdiv, launch
from compressft_kernels.numerics_triton import accumulator, activate, derivative, dtypes


@triton.jit
def _rows_kernel(
    dy, x, z, mean, rstd, up, down, sums, dx, h, dz, parts,
    T, D, R, OUT, PADDED, dy_row, x_row, up_row, down_row, scale, scale_rest,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, SHIFT: tl.constexpr,
    DOWN: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """BLOCK_T rows of dx, and for the weights' kernel of h = act(z) and dz (T, PADDED); each where it is not None.

    parts (programs, 2, PADDED): this program's sums over its rows of dz, and of mean times what went to dz.
    DOWN: dz is needed. SHIFT: the weights' kernel takes the mean off x. With NORM dz goes out times rstd, and `down`
    and `sums` are `fold`'s.
    """
    program = tl.program_id(0)
    t = program * BLOCK_T + tl.arange(0, BLOCK_T)
    alive = t < T
    far = t.to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    here = (r < R)[:, None] & alive[None, :]
    stored = (r < PADDED)[:, None] & alive[None, :]
    value = tl.load(z + far[None, :] * R + r[:, None], mask=here, other=0.0).to(ACC)
    place = far[None, :] * PADDED + r[:, None]
    if h is not None:
        # 0 in the padding: every activation is 0 at 0.
        tl.store(h + place, activate(value, ACTIVATION).to(COMPUTE), mask=stored)
    if DOWN:
        dy_t = dy + far[None, :] * dy_row
        acc = tl.zeros((BLOCK_R, BLOCK_T), ACC)
        for o0 in range(0, OUT, BLOCK_K):
            o = o0 + tl.arange(0, BLOCK_K)
            both = (r < R)[:, None] & (o < OUT)[None, :]
            a = tl.load(up + o.to(tl.int64)[None, :] * up_row + r[:, None], mask=both, other=0.0)
            b = tl.load(dy_t + o[:, None], mask=(o < OUT)[:, None] & alive[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        acc *= (tl.cast(scale, ACC) + tl.cast(scale_rest, ACC)) * derivative(value, ACTIVATION)
        rounded = acc.to(COMPUTE)
        if NORM:
            centre = tl.load(mean + t, mask=alive, other=0.0)
            inverse = tl.load(rstd + t, mask=alive, other=0.0)
            scaled = (acc * inverse[None, :]).to(COMPUTE)
        else:
            scaled = rounded
        if dz is not None:
            tl.store(dz + place, scaled, mask=stored)
        if parts is not None:
            mine = parts + program.to(tl.int64) * 2 * PADDED + r
            tl.store(mine, tl.sum(acc, 1), mask=r < PADDED)
            if NORM:
                # Of the rounded values, so that the mean cancels; with SHIFT it is taken off x itself.
                far_sum = tl.zeros((BLOCK_R,), ACC) if SHIFT else tl.sum(scaled.to(ACC) * centre[None, :], 1)
                tl.store(mine + PADDED, far_sum, mask=r < PADDED)
        if dx is not None:
            if NORM:
                g = tl.load(sums + r, mask=r < R, other=0.0)
                c = tl.load(sums + R + r, mask=r < R, other=0.0)
                used = rounded.to(ACC)
                average = tl.sum(used * g[:, None], 0) / D
                along = tl.sum(used * (value - c[:, None]), 0) / D
            chunks = tl.cdiv(D, BLOCK_O)
            for chunk in range(0, chunks):
                # Backwards: what was read last is still in L2 for the residual.
                k = (chunks - 1 - chunk) * BLOCK_O + tl.arange(0, BLOCK_O)
                inside = alive[:, None] & (k < D)[None, :]
                # Both ahead of the product, which hides the wait for them.
                if RESIDUAL:
                    skip = tl.load(dy + far[:, None] * dy_row + k[None, :], mask=inside, other=0.0)
                if NORM:
                    row = tl.load(x + far[:, None] * x_row + k[None, :], mask=inside, other=0.0)
                both = (k < D)[:, None] & (r < R)[None, :]
                a = tl.load(down + r.to(tl.int64)[None, :] * down_row + k[:, None], mask=both, other=0.0)
                part = tl.trans(tl.dot(a, rounded, input_precision=PRECISION, out_dtype=ACC))
                if NORM:
                    normal = (row.to(ACC) - centre[:, None]) * inverse[:, None]
                    part = inverse[:, None] * (part - average[:, None] - normal * along[:, None])
                if RESIDUAL:
                    part += skip.to(ACC)
                tl.store(dx + far[:, None] * D + k[None, :], part.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _outer(
    left, right, mean, total, column_total, tile, T, D, PADDED, row, again,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """total (SPLIT, D, PADDED) of left^T right over this split's rows; column_total (SPLIT, D) of left.

    left (T, D) has mean (T,) subtracted where that is not None. again: add to what is there.
    """
    split = tl.program_id(1)
    d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.arange(0, BLOCK_R)
    inside = (d < D)[:, None] & (r < PADDED)[None, :]
    place = (split * D + d).to(tl.int64)
    acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    if column_total is not None:
        column = tl.zeros((BLOCK_D, LANES), ACC)
    steps = tl.cdiv(tl.cdiv(T, BLOCK_T), SPLIT)
    end = tl.minimum((split + 1) * steps * BLOCK_T, T)
    for t0 in range(split * steps * BLOCK_T, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        far = t.to(tl.int64)
        a = tl.load(left + far[None, :] * row + d[:, None], mask=(d < D)[:, None] & (t < T)[None, :], other=0.0)
        b = tl.load(
            right + far[:, None] * PADDED + r[None, :], mask=(t < T)[:, None] & (r < PADDED)[None, :], other=0.0
        )
        if column_total is not None:
            # Rows this far apart lie in one thread; threads are summed over once, after the loop.
            column += tl.sum(a.to(ACC).reshape(BLOCK_D, BLOCK_T // LANES, LANES), 1)
        if mean is not None:
            a = (a.to(ACC) - tl.load(mean + t, mask=t < T, other=0.0)[None, :]).to(COMPUTE)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if column_total is not None:
            acc = finished(acc, t0 < end)
    target = total + place[:, None] * PADDED + r[None, :]
    tl.store(target, acc + tl.load(target, mask=inside & (again != 0), other=0.0), mask=inside)
    if column_total is not None:
        target = column_total + place
        before = tl.load(target, mask=(d < D) & (again != 0), other=0.0)
        tl.store(target, tl.sum(column, 1) + before, mask=d < D)


@triton.jit
def _weights_kernel(
    dy, x, h, dz, mean, up_total, column_total, down_total, T, D, OUT, PADDED, dy_row, x_row, up_tiles, again,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The first up_tiles programs: dy^T h and the sums of dy's columns; the others: x^T dz."""
    tile = tl.program_id(0)
    if tile < up_tiles:
        if up_total is not None:
            _outer(
                dy, h, None, up_total, column_total, tile, T, OUT, PADDED, dy_row, again,
                COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_R, BLOCK_D, SPLIT, LANES,
            )  # fmt: skip
    else:
        if down_total is not None:
            _outer(
                x, dz, mean, down_total, None, tile - up_tiles, T, D, PADDED, x_row, again,
                COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_R, BLOCK_D, SPLIT, LANES,
            )  # fmt: skip


@triton.jit
def _finish_kernel(
    up_total, column_total, down_total, sums, down, gamma, beta, d_up, d_up_bias, d_down, d_gamma, d_beta,
    D, R, OUT, PADDED, down_row, up_tiles, scale, scale_rest,
    SPLIT: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients from `_weights_kernel`'s totals and sums (2, PADDED), the totals of `_rows_kernel`'s parts."""
    tile = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    if tile < up_tiles:
        if up_total is not None:
            factor = tl.cast(scale, ACC) + tl.cast(scale_rest, ACC)
            d = (tile * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
            inside = (d < OUT)[:, None] & (r < R)[None, :]
            for split in range(SPLIT):
                acc += tl.load(up_total + (split * OUT + d)[:, None] * PADDED + r[None, :], mask=inside, other=0.0)
            tl.store(d_up + d[:, None] * R + r[None, :], (acc * factor).to(d_up.dtype.element_ty), mask=inside)
            if d_up_bias is not None:
                column = tl.zeros((BLOCK_D,), ACC)
                for split in range(SPLIT):
                    column += tl.load(column_total + split * OUT + d, mask=d < OUT, other=0.0)
                tl.store(d_up_bias + d, (column * factor).to(d_up_bias.dtype.element_ty), mask=d < OUT)
    else:
        d = ((tile - up_tiles) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (d < D)[:, None] & (r < R)[None, :]
        turned = r.to(tl.int64)[None, :]
        if down_total is not None:
            for split in range(SPLIT):
                acc += tl.load(down_total + (split * D + d)[:, None] * PADDED + r[None, :], mask=inside, other=0.0)
        if gamma is not None:
            weight = tl.load(down + turned * down_row + d[:, None], mask=inside, other=0.0).to(ACC)
            bias = tl.load(sums + r, mask=r < R, other=0.0)
            acc -= tl.load(sums + PADDED + r, mask=r < R, other=0.0)[None, :]
            if d_gamma is not None:
                tl.store(d_gamma + d, tl.sum(acc * weight, 1).to(d_gamma.dtype.element_ty), mask=d < D)
            if d_beta is not None:
                sum_beta = tl.sum(weight * bias[None, :], 1)
                tl.store(d_beta + d, sum_beta.to(d_beta.dtype.element_ty), mask=d < D)
            acc *= tl.load(gamma + d, mask=d < D, other=0.0).to(ACC)[:, None]
            acc += tl.load(beta + d, mask=d < D, other=0.0).to(ACC)[:, None] * bias[None, :]
        if d_down is not None:
            tl.store(d_down + turned * D + d[:, None], acc.to(d_down.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Wanted:
    """Which gradients `backward` computes."""

    x: bool = True
    down_weight: bool = True
    down_bias: bool = True
    up_weight: bool = True
    up_bias: bool = True
    gamma: bool = True
    beta: bool = True


def shares(
    size: tuple[int, int, int], itemsize: int, config_rows: Mapping[str, int], config_weights: Mapping[str, int],
    programs: int, cache: int = 32 << 20,
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """`backward`'s configs for sizes (T, d, out), completed by CHUNK and SPLIT.

    Args:
        programs: blocks that the device runs at a time. A chunk fills it a whole number of times, and the weights'
            kernel twice.
        cache: bytes of dy in a chunk; about half of the device's L2.
    """
    length, width, out = size
    wave = programs * config_rows["BLOCK_T"]
    chunk = wave * max(1, cache // (wave * max(width, out) * itemsize))
    block = config_weights["BLOCK_D"]
    tiles = cdiv(width, block) + cdiv(out, block)
    # No fewer than four tiles of tokens to a program.
    most = cdiv(min(length, chunk), 4 * config_weights["BLOCK_T"])
    # A power of two: each value compiles a kernel.
    split = 1 << max(1, min(2 * programs // tiles, most)).bit_length() - 1
    return {**config_rows, "CHUNK": chunk}, {**config_weights, "SPLIT": split}


Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def backward(
    dy: Tensor, x: Tensor, z: Tensor, mean: Tensor, rstd: Tensor,
    down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    gamma: Tensor | None, beta: Tensor | None, activation: str, scale: float, residual_is_x: bool,
    wanted: Wanted, config_rows: Mapping[str, int], config_weights: Mapping[str, int],
) -> Gradients:  # fmt: skip
    """Gradients of x, down weight, down bias, up weight, up bias, gamma and beta; None where not wanted or absent.

    Args:
        dy: (T, out), the gradient of y; a residual other than x has dy for its own.
        x, z, mean, rstd: (T, d) and what `forward` saved.
        config_rows: as `forward`'s config, and CHUNK, rows at a time: a multiple of 16 and of BLOCK_T.
        config_weights: BLOCK_T, BLOCK_D, tokens and columns of x or dy at a time; BLOCK_R, as in `forward`; SPLIT,
            programs that share a chunk's tokens; num_warps, num_stages.
    """
    dy, x, down_weight, up_weight = rows(dy), rows(x), rows(down_weight), rows(up_weight)
    length, width = x.shape
    out, size = up_weight.shape
    rows_options = dict(config_rows)
    chunk = rows_options.pop("CHUNK")
    block_t, split, block_d = config_rows["BLOCK_T"], config_weights["SPLIT"], config_weights["BLOCK_D"]
    assert chunk % block_t == 0 and chunk % 16 == 0 and min(config_rows["BLOCK_R"], config_weights["BLOCK_R"]) >= size
    norm = gamma is not None and beta is not None
    bias_wanted = wanted.down_bias and down_bias is not None
    gamma_wanted, beta_wanted = wanted.gamma and norm, wanted.beta and norm
    column_wanted = wanted.up_bias and up_bias is not None
    outer_wanted = wanted.down_weight or gamma_wanted
    parts_wanted = bias_wanted or beta_wanted or (norm and outer_wanted)

    def like(tensor: Tensor | None, needed: bool) -> Tensor | None:
        if tensor is None or not needed:
            return None
        shape, dtype = tensor.shape, tensor.dtype
        return tensor.new_zeros(shape, dtype=dtype) if length == 0 else tensor.new_empty(shape, dtype=dtype)

    dx = like(x, wanted.x)
    d_down, d_up = like(down_weight, wanted.down_weight), like(up_weight, wanted.up_weight)
    d_down_bias, d_up_bias = like(down_bias, bias_wanted), like(up_bias, column_wanted)
    d_gamma, d_beta = like(gamma, gamma_wanted), like(beta, beta_wanted)
    gradients = dx, d_down, d_down_bias, d_up, d_up_bias, d_gamma, d_beta
    if length == 0:
        return gradients

    total = accumulator(x.dtype)
    types = dtypes(x.dtype)
    shift = x.dtype.itemsize >= 4
    sums = None
    if gamma is not None and beta is not None:
        down, sums = fold(down_weight, down_bias, gamma, beta, x.dtype)
    else:
        down = down_weight.to(x.dtype)
    up = up_weight.to(x.dtype)
    padded = cdiv(size, 16) * 16
    scratch = min(chunk, length), padded
    h = x.new_empty(scratch) if wanted.up_weight else None
    dz = x.new_empty(scratch) if outer_wanted else None
    programs = cdiv(length, block_t)
    parts = x.new_empty((programs, 2, padded), dtype=total) if parts_wanted else None
    up_total = x.new_empty((split, out, padded), dtype=total) if wanted.up_weight else None
    column_total = x.new_empty((split, out), dtype=total) if wanted.up_weight and column_wanted else None
    down_total = x.new_empty((split, width, padded), dtype=total) if outer_wanted else None
    up_tiles = cdiv(out, block_d) if wanted.up_weight else 0
    tiles = up_tiles + (cdiv(width, block_d) if outer_wanted else 0)
    down_needed = wanted.x or outer_wanted or parts_wanted
    factor = two_parts(scale)
    # Rows of a tile that the threads load at a time, 16 bytes each.
    lanes = config_weights["num_warps"] * 32 * 16 // x.dtype.itemsize // block_d
    lanes = max(1, min(lanes, config_weights["BLOCK_T"]))
    for start in range(0, length, chunk) if down_needed or wanted.up_weight else ():
        end = min(start + chunk, length)
        part = slice(start, end)
        dy_part, x_part = dy[part], x[part]
        mean_part, rstd_part = (mean[part], rstd[part]) if norm else (None, None)
        launch(
            _rows_kernel, (cdiv(end - start, block_t),),
            dy_part, x_part, z[part], mean_part, rstd_part, up, down, sums, None if dx is None else dx[part], h, dz,
            None if parts is None else parts[start // block_t :],
            end - start, width, size, out, padded, dy.stride(0), x.stride(0), up.stride(0), down.stride(0), *factor,
            ACTIVATION=activation, NORM=norm, RESIDUAL=residual_is_x, SHIFT=shift, DOWN=down_needed,
            **types, **rows_options,
        )  # fmt: skip
        launch(
            _weights_kernel, (tiles, split),
            dy_part, x_part, h, dz, mean_part if shift else None, up_total, column_total, down_total,
            end - start, width, out, padded, dy.stride(0), x.stride(0), up_tiles, start,
            LANES=lanes, **types, **config_weights,
        )  # fmt: skip
    summed = None
    if parts is not None:
        summed = parts.sum(0)
        if d_down_bias is not None:
            d_down_bias.copy_(summed[0, :size])
    if column_wanted and d_up_bias is not None and column_total is None:
        d_up_bias.copy_(dy.sum(0, dtype=total) * scale)
    block = 16
    up_tiles = cdiv(out, block) if wanted.up_weight else 0
    down_tiles = cdiv(width, block) if outer_wanted or beta_wanted else 0
    launch(
        _finish_kernel, (up_tiles + down_tiles,),
        up_total, column_total, down_total, summed, down_weight, gamma, beta, d_up, d_up_bias, d_down, d_gamma, d_beta,
        width, size, out, padded, down_weight.stride(0), up_tiles, *factor,
        SPLIT=split, ACC=types["ACC"], BLOCK_R=config_weights["BLOCK_R"], BLOCK_D=block, num_warps=4,
    )  # fmt: skip
    return gradients
