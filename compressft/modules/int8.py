"""Fake quantisation in onnxruntime's own arithmetic: u8 activations, s8 weights symmetric per channel.

Formulas: ONNX QuantizeLinear / DynamicQuantizeLinear (u8, range extended to contain 0, scale = (max - min) / 255,
zero point = round(-min / scale), round half to even) and weights on the grid of `portable_scale`. The training forward
multiplies the *integers*: both factors are exact in bf16 (|n| <= 256) and their sums are exact in fp32 below 2^24, so
training computes what the integer kernel of the exported graph computes, on every processor.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft.modules.last_input import last_input

QMAX = 255.0
# Largest weight integer by `weight_bits`.
WMAX = {8: 127.0, 7: 63.0}
# Largest sum of two adjacent weights before they are rounded, which may add a half to each: 255 * 128 is below 2^15.
PAIR_MAX = 127.0


class InputGrid(NamedTuple):
    """What a layer's inputs are rounded to, fp32 scalars; the zero point is integral in [0, 255]."""

    scale: Tensor
    zero_point: Tensor


class LayerRounding(NamedTuple):
    """How a layer is rounded besides.

    Attributes:
        w_scale: of the weight's rows, fp32 (out,); None: `portable_scale`.
        rate: share of the weights, drawn again at each call, that is rounded (Fan et al. 2020, "Training with
            quantization noise", section 4.1).
        ends: low and high of the inputs' range, where they are to get a gradient.
    """

    w_scale: Tensor | None = None
    rate: float = 1.0
    ends: tuple[Tensor, Tensor] | None = None


WHOLE = LayerRounding()


def activation_scale(low: Tensor, high: Tensor) -> InputGrid:
    """The grid of the range [low, high]."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / QMAX
    # A range of zero width (all inputs 0) would give scale 0; any positive scale represents it exactly.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return InputGrid(scale, torch.round(-low / scale).clamp(0.0, QMAX))


def weight_scale(weight: Tensor, bits: int = 8) -> Tensor:
    """Per-row scale max|w| / 127 (63 for 7 bits) of a (rows, columns) weight, fp32, shape (rows,); 1 for zeros."""
    return _scale(weight.detach().abs().amax(dim=1), WMAX[bits])


def portable_scale(weight: Tensor, columns: Tensor | None = None) -> Tensor:
    """Per-row scale of a (rows, columns) weight, fp32 (rows,), with which no pair of u8 x s8 products passes 16 bits.

    x86 processors without VNNI add the products of columns 2k and 2k + 1 in saturating 16 bits (vpmaddubsw). So it is
    not the largest weight that becomes 127 but the largest sum of such a pair, of weights with one sign; of two signs
    the larger weight alone bounds the sum. It is at most twice as coarse as `weight_scale`.

    Args:
        columns: factors (columns,), 0 for those that will be gone: what is left of them becomes adjacent.
    """
    # In fp32: sums of bf16 weights, rounded, would pass the bound.
    weight = _exact(weight.detach())
    if columns is not None:
        # Those that stay come first, in their order: no waiting for a device to count them.
        weight = weight[:, torch.argsort(columns == 0, stable=True)]
    if weight.shape[1] % 2:
        weight = F.pad(weight, (0, 1))
    pairs = weight[:, 0::2] + weight[:, 1::2]
    return _scale(torch.maximum(weight.abs().amax(dim=1), pairs.abs().amax(dim=1)), PAIR_MAX)


def _exact(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _scale(peak: Tensor, largest: float) -> Tensor:
    peak = peak.float()
    return torch.where(peak > 0, peak / largest, torch.ones_like(peak))


def quantise_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Integers (as floats of the weight's dtype) in [-127, 127] for the rows' scales."""
    return (_exact(weight) / scale[:, None]).round_().to(weight.dtype)


def quantise_input(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """round(x / scale) as bf16, which holds these integers exactly: the levels of x less the zero point.

    -zero_point .. 255 - zero_point where x is in the range; one less or more where it is clipped (`centred`, `inside`).
    """
    low, high = _ends(zero_point)
    return (x.float() / scale).round_().clamp_(low - 1, high + 1).to(torch.bfloat16)


def centred(marked: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """The integers that are multiplied, of what `quantise_input` gave: clipped ones lie at the range's ends."""
    return marked.clamp(*_ends(zero_point)).to(dtype)


def inside(grad: Tensor, marked: Tensor, zero_point: Tensor) -> Tensor:
    """The gradient where x was not clipped, else 0."""
    low, high = _ends(zero_point)
    marked = marked.to(grad.dtype)
    if isinstance(low, Tensor):
        marked, low, high = marked - low, 0.0, QMAX
    # One vectorised pass, which masked_fill is not on CPU; zero from the two bounds outwards.
    return torch.ops.aten.hardtanh_backward(grad, marked, low - 1, high + 1)


def _ends(zero_point: Tensor) -> tuple[Any, Any]:
    """-zero_point and 255 - zero_point: numbers on CPU, where clamping to tensors is slow."""
    low: Any = -zero_point
    if low.device.type == "cpu" and not torch.compiler.is_compiling():
        low = float(low)
    return low, low + QMAX


class _QuantisedLinear(torch.autograd.Function):
    """y = (q_x - z) q_W^T * (s_x s_W) + b; straight-through for rounding, zero gradient where x was clipped.

    Saves two bytes per element of the input, which say its integer and whether it was clipped, and the integer weight;
    the input too where the ends of its range are learned.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, low, high, x_scale, zero_point, dtype, w_scale, rate):
        key = (float(x_scale), float(zero_point)) if x.device.type == "cpu" else None
        marked = last_input.value(x, key, lambda: quantise_input(x, x_scale, zero_point))
        levels = last_input.value(x, (key, dtype), lambda: centred(marked, zero_point, dtype))
        q_weight = quantise_weight(weight, w_scale)
        if rate < 1.0:
            smooth = torch.rand(weight.shape, device=weight.device) >= rate
            q_weight = torch.where(smooth, weight / w_scale.to(weight.dtype)[:, None], q_weight)
        q_weight = q_weight.to(dtype)
        scale = x_scale * w_scale
        if dtype is torch.float16:
            # Sums of integer products overflow fp16; powers of two keep them exact.
            acc = (levels * 2.0**-8) @ (q_weight * 2.0**-7).t()
            scale = scale * 2.0**15
        else:
            acc = levels @ q_weight.t()
        y = acc.float().mul_(scale)
        if bias is not None:
            y += bias
        ctx.learns = any(ctx.needs_input_grad[3:5])
        kept = x if ctx.learns else None
        ctx.save_for_backward(marked, q_weight, w_scale, x_scale, zero_point, kept)
        ctx.has_bias = bias is not None
        ctx.dtype = dtype
        ctx.x_dtype = x.dtype
        return y.to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        marked, q_weight, w_scale, x_scale, zero_point, x = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_b = grad_low = grad_high = None
        if ctx.needs_input_grad[0] or ctx.learns:
            grad_x = ((flat * w_scale.to(ctx.dtype)) @ q_weight).view(marked.shape)
            if ctx.learns:
                grad_low, grad_high = _range_gradient(grad_x.float(), x.float(), marked, x_scale, zero_point)
            grad_x = inside(grad_x, marked, zero_point).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            levels = centred(marked, zero_point, ctx.dtype).reshape(-1, marked.shape[-1])
            grad_w = (flat.t() @ levels).float().mul_(x_scale)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = flat.float().sum(0)
        return grad_x, grad_w, grad_b, grad_low, grad_high, None, None, None, None, None


def _range_gradient(
    grad: Tensor, x: Tensor, marked: Tensor, scale: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dlow and dL/dhigh of a range, given dL/d(dequantised x).

    A clipped value moves with its end of the range (Choi et al. 2018, PACT, equation 3); any other moves the step by
    its rounding error (Esser et al. 2020, LSQ, equation 3), with their factor 1 / sqrt(N * Qmax) (section 2.2).
    """
    levels = centred(marked, zero_point, torch.float32)
    # 1 above the range, -1 below, 0 inside.
    beyond = marked.float() - levels
    error = torch.where(beyond != 0, 0.0, levels - x / scale) / QMAX
    high = torch.where(beyond > 0, 1.0, error)
    low = torch.where(beyond < 0, 1.0, -error)
    factor = 1.0 / math.sqrt(max(x.numel(), 1) * QMAX)
    return (grad * low).sum() * factor, (grad * high).sum() * factor


def quantised_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: InputGrid, rounding: LayerRounding = WHOLE
) -> Tensor:
    """Linear layer in int8 arithmetic.

    Args:
        x: (..., in) floating.
        weight: (out, in), quantised here with one symmetric scale per row.
        bias: (out,) or None, kept in fp32.
        grid: of the input's range (`activation_scale`).

    Returns:
        (..., out) in the autocast dtype where autocast is on, else in x's dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    low, high = rounding.ends if rounding.ends is not None else (None, None)
    w_scale = portable_scale(weight) if rounding.w_scale is None else rounding.w_scale
    return _QuantisedLinear.apply(x, weight, bias, low, high, *grid, dtype, w_scale, rounding.rate)  # type: ignore[return-value]
