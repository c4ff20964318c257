"""Deployed int8 layers: onnxruntime's own operators, or standard QuantizeLinear / DequantizeLinear. Only exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.int8 import activation_scale, quantise_weight, weight_scale
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int8Quantizer

# Of an operator that torch does not have; None: an optional one that is not there.
Inputs = Sequence[Tensor | None]


class Rounded(nn.Module, ABC):
    """A layer's rounded values, as training used them. Never run in torch.

    Holds the (in, out) int8 weight, its per-column fp32 scales, the bias, and for fixed ranges the input's scale and
    u8 zero point.
    """

    weight: Tensor
    weight_scale: Tensor
    x_scale: Tensor
    x_zero_point: Tensor

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        quantizer = linear.quantizer
        assert isinstance(quantizer, Int8Quantizer)
        self.dynamic = quantizer.ranges == "dynamic"
        scale = quantizer.weight_scale(linear.weight)
        self.register_buffer("weight", quantise_weight(linear.weight.detach(), scale).to(torch.int8).t().contiguous())
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())
        x_scale, zero_point = activation_scale(quantizer.low.detach(), quantizer.high.detach())
        self.register_buffer("x_scale", x_scale)
        self.register_buffer("x_zero_point", zero_point.to(torch.uint8))

    def quantised(self, x: Tensor) -> Tensor:
        """x as u8."""
        inputs: Inputs = [x, self.x_scale, self.x_zero_point]
        return torch.onnx.ops.symbolic("QuantizeLinear", inputs, dtype=torch.uint8, shape=x.shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer's product as operators of a graph, (..., in) -> (..., out)."""


class Int8Linear(Rounded):
    """QuantizeLinear + `com.microsoft::MatMulIntegerToFloat` (fixed ranges), or `DynamicQuantizeMatMul`."""

    def forward(self, x: Tensor) -> Tensor:
        bias = [self.bias] if isinstance(self.bias, Tensor) else []
        if self.dynamic:
            name = "DynamicQuantizeMatMul"
            inputs: Inputs = [x, self.weight, self.weight_scale, None, *bias]
        else:
            name = "MatMulIntegerToFloat"
            scales = [self.x_scale, self.weight_scale, self.x_zero_point]
            inputs = [self.quantised(x), self.weight, *scales, None, *bias]
        shape = [*x.shape[:-1], self.weight.shape[1]]
        return torch.onnx.ops.symbolic(f"com.microsoft::{name}", inputs, dtype=torch.float32, shape=shape, version=1)


class QdqLinear(Rounded):
    """The same values in standard operators: QuantizeLinear, two DequantizeLinear (per column for the weight), MatMul.

    Without a runtime's fusions this computes in fp32 what training computed in integers.
    """

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__(linear)
        self.register_buffer("weight_zero_point", torch.zeros(self.weight.shape[1], dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        rounded: Inputs = [self.quantised(x), self.x_scale, self.x_zero_point]
        weight: Inputs = [self.weight, self.weight_scale, self.get_buffer("weight_zero_point")]
        shape = self.weight.shape
        left = torch.onnx.ops.symbolic("DequantizeLinear", rounded, dtype=torch.float32, shape=x.shape)
        right = torch.onnx.ops.symbolic("DequantizeLinear", weight, {"axis": 1}, dtype=torch.float32, shape=shape)
        y = left @ right
        return y + self.bias if isinstance(self.bias, Tensor) else y


class Int8Embedding(nn.Module):
    """Gather of int8 rows times their fp32 scales; standard operators."""

    weight: Tensor
    scale: Tensor

    def __init__(self, embedding: CompressedEmbedding) -> None:
        super().__init__()
        scale = weight_scale(embedding.weight)
        self.register_buffer("weight", quantise_weight(embedding.weight.detach(), scale).to(torch.int8))
        self.register_buffer("scale", scale[:, None].contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        # F.embedding becomes Gather; indexing would become the slower GatherND.
        return F.embedding(ids, self.weight).to(torch.float32) * F.embedding(ids, self.scale)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., dim) times all rows, (..., rows); onnxruntime makes fp32 of them once, when it loads the file."""
        return F.linear(x, self.weight.to(torch.float32) * self.scale, bias)
