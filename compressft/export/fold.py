"""The deployed form of a trained model: plain layers, and int8 layers that emit onnxruntime's own operators."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.model import replace
from compressft.modules.attention import EXPORT
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int8Quantizer, activation_scale, quantise_weight, weight_scale


class Int8Linear(nn.Module):
    """QuantizeLinear + `com.microsoft::MatMulIntegerToFloat` (static), or `DynamicQuantizeMatMul`.

    Holds the (in, out) int8 weight, its per-column fp32 scales, the bias, and for static ranges the input's scale and
    u8 zero point: the values that training used. Only exported, never run in torch.
    """

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        quantizer = linear.quantizer
        assert isinstance(quantizer, Int8Quantizer)
        self.dynamic = quantizer.dynamic
        scale = weight_scale(linear.weight)
        self.register_buffer("weight", quantise_weight(linear.weight.detach(), scale).to(torch.int8).t().contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        x_scale, zero_point = activation_scale(quantizer.low, quantizer.high)
        self.register_buffer("x_scale", x_scale)
        self.register_buffer("x_zero_point", zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if self.dynamic:
            name = "DynamicQuantizeMatMul"
            inputs: list[Any] = [x, self.weight, self.weight_scale, None, self.bias]
        else:
            ranged: list[Any] = [x, self.x_scale, self.x_zero_point]
            q = torch.onnx.ops.symbolic("QuantizeLinear", ranged, dtype=torch.uint8, shape=x.shape)
            name = "MatMulIntegerToFloat"
            inputs = [q, self.weight, self.x_scale, self.weight_scale, self.x_zero_point, None, self.bias]
        if inputs[-1] is None:
            inputs.pop()
        shape = [*x.shape[:-1], self.weight.shape[1]]  # type: ignore[union-attr]
        return torch.onnx.ops.symbolic(f"com.microsoft::{name}", inputs, dtype=torch.float32, shape=shape, version=1)


class Int8Embedding(nn.Module):
    """Gather of int8 rows times their fp32 scales."""

    def __init__(self, embedding: CompressedEmbedding) -> None:
        super().__init__()
        scale = weight_scale(embedding.weight)
        self.register_buffer("weight", quantise_weight(embedding.weight.detach(), scale).to(torch.int8))
        self.register_buffer("scale", scale[:, None].contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor) and isinstance(self.scale, Tensor)
        # F.embedding becomes Gather; indexing would become the slower GatherND.
        return F.embedding(ids, self.weight).to(torch.float32) * F.embedding(ids, self.scale)


class AdaptedInt8(nn.Module):
    """An int8 layer followed by the adapter of its slot."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.inner(x))


def fold(model: nn.Module) -> nn.Module:
    """A copy of a finalised model in which every compressed module has its deployed form, ready to be exported."""
    deployed = copy.deepcopy(model).eval().requires_grad_(False)
    for path, module in list(deployed.named_modules()):
        if isinstance(module, CompressedLinear):
            module.fold()
            adapter, module.adapter = module.adapter, None
            new = module.restore() if module.quantizer is None else Int8Linear(module)
            replace(deployed, path, new if adapter is None else AdaptedInt8(new, adapter))
        elif isinstance(module, CompressedEmbedding):
            replace(deployed, path, Int8Embedding(module))
    deployed.config._attn_implementation = EXPORT  # type: ignore[union-attr]
    return deployed
