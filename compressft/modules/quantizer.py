"""Fake quantisation in onnxruntime's own arithmetic: u8 activations, s8 weights symmetric per channel.

Formulas: ONNX QuantizeLinear / DynamicQuantizeLinear (u8, range extended to contain 0, scale = (max - min) / 255,
zero point = round(-min / scale), round half to even) and weights with scale = max|w| / 127. The training forward
multiplies the *integers*: both factors are exact in bf16 (|n| <= 256) and their sums are exact in fp32 below 2^24, so
training computes what the integer kernel of the exported graph computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

QMAX = 255.0
WMAX = 127.0


def activation_scale(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both fp32 scalars, the zero point integral in [0, 255]) of the range [low, high]."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / QMAX
    # A range of zero width (all inputs 0) would give scale 0; any positive scale represents it exactly.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round(-low / scale).clamp(0.0, QMAX)


def weight_scale(weight: Tensor) -> Tensor:
    """Per-row scale max|w| / 127 of a (rows, columns) weight, fp32, shape (rows,); 1 for rows of zeros."""
    peak = weight.detach().abs().amax(dim=1).float()
    return torch.where(peak > 0, peak / WMAX, torch.ones_like(peak))


def quantise_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Integers (as floats of the weight's dtype) in [-127, 127]."""
    return torch.round(weight / scale.to(weight.dtype)[:, None])


class _QuantisedLinear(torch.autograd.Function):
    """y = (q_x - z) q_W^T * (s_x s_W) + b; straight-through for rounding, zero gradient where x was clipped.

    Saves one byte for the quantised input and one for its clipping mask per element, and the integer weight.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, x_scale, zero_point, dtype):
        q = torch.round(x.float() / x_scale).add_(zero_point)
        level = q.clamp(0.0, QMAX)
        clipped = q != level
        w_scale = weight_scale(weight)
        q_weight = quantise_weight(weight, w_scale).to(dtype)
        scale = x_scale * w_scale
        centred = level.sub(zero_point).to(dtype)
        if dtype is torch.float16:
            # Sums of integer products overflow fp16; powers of two keep them exact.
            acc = (centred * 2.0**-8) @ (q_weight * 2.0**-7).t()
            scale = scale * 2.0**15
        else:
            acc = centred @ q_weight.t()
        y = acc.float() * scale
        if bias is not None:
            y += bias
        ctx.save_for_backward(level.to(torch.uint8), clipped, q_weight, w_scale, x_scale, zero_point)
        ctx.has_bias = bias is not None
        ctx.dtype = dtype
        ctx.x_dtype = x.dtype
        return y.to(dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, clipped, q_weight, w_scale, x_scale, zero_point = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = ((flat * w_scale.to(ctx.dtype)) @ q_weight).view(q.shape)
            grad_x = grad_x.masked_fill(clipped, 0.0).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            centred = (q.to(ctx.dtype) - zero_point.to(ctx.dtype)).reshape(-1, q.shape[-1])
            grad_w = (flat.t() @ centred).float() * x_scale
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_b = flat.float().sum(0)
        return grad_x, grad_w, grad_b, None, None, None


def quantised_linear(x: Tensor, weight: Tensor, bias: Tensor | None, x_scale: Tensor, zero_point: Tensor) -> Tensor:
    """Linear layer in int8 arithmetic.

    Args:
        x: (..., in) floating.
        weight: (out, in), quantised here with one symmetric scale per row.
        bias: (out,) or None, kept in fp32.
        x_scale, zero_point: fp32 scalars of the input's range (`activation_scale`).

    Returns:
        (..., out) in the autocast dtype where autocast is on, else in x's dtype.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _QuantisedLinear.apply(x, weight, bias, x_scale, zero_point, dtype)  # type: ignore[return-value]


class Quantizer(nn.Module):
    """Base of the `quantizer` slot: multiplies as the deployed layer will."""

    @property
    def ready(self) -> bool:
        """Whether the layer computes in the deployed arithmetic now (else in floating point)."""
        raise NotImplementedError

    def observe(self, x: Tensor, columns: Tensor | None) -> None:
        """See an input (..., in) in training; those of columns whose factor is 0 (in,) do not count."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        """x (..., in) times the quantised weight (out, in), plus the bias (out,): (..., out)."""
        raise NotImplementedError


class Int8Quantizer(Quantizer):
    """u8 inputs by the range of one linear layer, s8 weights.

    Buffers: `low`, `high` (fp32, the range), `batches` (int64, how many batches were seen). `dynamic` takes each
    input tensor's own range instead. The range is an exponential average of per-batch minima and maxima; the first
    batch is copied. A static quantizer that has seen no batch yet leaves its layer in floating point.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, dynamic: bool = False, momentum: float = 0.99) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.momentum = momentum
        self.active = True
        self.observing = True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def ready(self) -> bool:
        """Whether the layer computes in int8 now."""
        return self.active and (self.dynamic or int(self.batches) > 0)

    @torch.no_grad()
    def observe(self, x: Tensor, columns: Tensor | None) -> None:
        """Move the range towards x; nothing when dynamic or frozen."""
        if self.dynamic or not self.observing:
            return
        low, high = _range(x, columns)
        momentum = self.momentum if int(self.batches) else 0.0
        self.low.mul_(momentum).add_(low * (1.0 - momentum))
        self.high.mul_(momentum).add_(high * (1.0 - momentum))
        self.batches += 1

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        return quantised_linear(x, weight, bias, *self.scale(x, columns))

    def scale(self, x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point for the input x; `columns` as in `observe`."""
        return activation_scale(*_range(x, columns)) if self.dynamic else activation_scale(self.low, self.high)


@torch.no_grad()
def _range(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value, fp32; gated-off columns count as 0, which every range contains."""
    if columns is None:
        low, high = torch.aminmax(x)
    else:
        low, high = torch.aminmax(x.reshape(-1, x.shape[-1]), dim=0)
        low, high = (low * columns).amin(), (high * columns).amax()
    return low.float(), high.float()
