"""GatedNorm: LayerNorm or RMSNorm over those dimensions of the residual stream that are still alive."""

from __future__ import annotations

from typing import Protocol

import torch
from compressft_kernels.kept import Kept
from torch import Tensor, nn

from compressft.modules.bottleneck import links
from compressft.modules.gate import GroupGate
from compressft.modules.linear import is_dense


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
    centred: bool


class _LiveNorm(torch.autograd.Function):
    """y = gate * (weight * (x - mean) / sqrt(var + eps) + bias), mean and var over the dimensions with gate != 0.

    The gate's gradient is that of the output factor alone: which dimensions enter the statistics is no smooth choice.
    Only x and two numbers per row are saved.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, eps: float, centred: bool):
        wide = x if x.dtype is torch.float64 else x.float()
        live = (gate != 0).to(wide.dtype)
        number = live.sum()
        mean = (wide * live).sum(-1, keepdim=True) / number if centred else wide.new_zeros(())
        difference = wide - mean
        rstd = torch.rsqrt((difference.square() * live).sum(-1, keepdim=True) / number + eps)
        y = difference * rstd * weight
        if bias is not None:
            y = y + bias
        ctx.save_for_backward(x, weight, bias, gate, mean, rstd)
        ctx.centred = centred
        return (y * gate).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: _Context, grad: Tensor):  # type: ignore[override]
        x, weight, bias, gate, mean, rstd = ctx.saved_tensors
        wide = x if x.dtype is torch.float64 else x.float()
        live = (gate != 0).to(wide.dtype)
        number = live.sum()
        normal = (wide - mean) * rstd
        grad = grad.to(wide.dtype)
        d_x = d_weight = d_bias = d_gate = None
        rows = tuple(range(grad.dim() - 1))
        if ctx.needs_input_grad[0]:
            g = grad * (gate * weight)
            inner = g - normal * ((g * normal).sum(-1, keepdim=True) / number)
            if ctx.centred:
                inner = inner - g.sum(-1, keepdim=True) / number
            d_x = (inner * rstd * live).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (grad * gate * normal).sum(rows)
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = (grad * gate).sum(rows)
        if ctx.needs_input_grad[3]:
            y = normal * weight if bias is None else normal * weight + bias
            d_gate = (grad * y).sum(rows)
        return d_x, d_weight, d_bias, d_gate, None, None


class GatedNorm(nn.LayerNorm):
    """A norm over the live dimensions of its input (..., d) that writes 0 to the others and the gate's factor to all.

    It stands where the norm it took over stood and shares its parameters (and the adapter of an AdaptedNorm) under
    their names. The gate is one for the whole model and registered elsewhere.
    """

    adapter: nn.Module | None
    # In tuples, so that neither is registered a second time.
    gate: tuple[GroupGate]
    original: tuple[nn.Module]
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, gate: GroupGate) -> GatedNorm:
        """Take over a LayerNorm, an AdaptedNorm, or an RMSNorm of any model."""
        weight = norm.get_parameter("weight")
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None)
        assert isinstance(eps, float)
        with torch.device("meta"):
            new = cls(weight.shape, eps=eps)
        new.weight, new.bias = weight, getattr(norm, "bias", None)  # type: ignore[assignment]
        new.adapter = getattr(norm, "adapter", None)
        new.gate, new.original = (gate,), (norm,)  # type: ignore[assignment]
        new.centred = isinstance(norm, nn.LayerNorm)  # type: ignore[assignment]
        new.train(norm.training)
        return new

    def restore(self) -> nn.Module:
        """The norm this came from, with the gate's factor in its parameters; dead dimensions are to be cut off next."""
        with torch.no_grad():
            factor = self.gate[0].columns().detach()
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    parameter.data = parameter * factor
        return self.original[0].train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if is_dense():
            return self.original[0](input)
        for adapter in [] if self.adapter is None else links(self.adapter):
            input = adapter(self._normalised(input), residual=input)
        return self._normalised(input)

    def _normalised(self, x: Tensor) -> Tensor:
        gate = self.gate[0].columns()
        return _LiveNorm.apply(x, self.weight, self.bias, gate, self.eps, self.centred)  # type: ignore[return-value]
