"""Deployed int4 layers: onnxruntime's MatMulNBits and GatherBlockQuantized, or standard operators for tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.int4 import ZERO, grid_of, pack, quantise
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer

# Of an operator that torch does not have.
Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
Attributes = dict[str, Attribute]


class Int4Linear(nn.Module):
    """`com.microsoft::MatMulNBits` with the integers and scales of training; never run in torch.

    Holds `weight` uint8 (out, blocks, block / 2), `scale` fp32 (out, blocks), `zero_point` uint8
    (out, ceil(blocks / 2)) where it is not the operator's default 8, and the bias.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        quantizer = linear.quantizer
        assert isinstance(quantizer, Int4Quantizer)
        weight = linear.weight.detach()
        grid = quantizer.grid(weight)
        self.rows, self.columns = weight.shape
        self.block = quantizer.block
        self.accuracy_level = quantizer.accuracy_level
        self.register_buffer("weight", pack(quantise(weight, self.block, grid)))
        self.register_buffer("scale", grid.scale.clone())
        zero_point = F.pad(grid.zero_point, (0, grid.zero_point.shape[1] % 2))
        self.register_buffer("zero_point", None if quantizer.symmetric else pack(zero_point))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        attributes: Attributes = {"K": self.columns, "N": self.rows, "bits": 4, "block_size": self.block}
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        zero_point, bias = (one if isinstance(one, Tensor) else None for one in (self.zero_point, self.bias))
        inputs: list[Tensor | None] = [x, self.weight, self.scale, zero_point, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        shape = [*x.shape[:-1], self.rows]
        name = "com.microsoft::MatMulNBits"
        return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=torch.float32, shape=shape, version=1)


class Int4Embedding(nn.Module):
    """Lookup of packed rows: one `com.microsoft::GatherBlockQuantized`, or Gather and arithmetic where `portable`.

    Holds `weight` uint8 (rows, ceil(dim / 2)), or whole blocks where `whole`, and `scale` fp32 (rows, blocks): 0.63
    bytes a weight.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, embedding: CompressedEmbedding, portable: bool = False, whole: bool = False) -> None:
        super().__init__()
        table = embedding.weight.detach()
        self.dim, self.block, self.portable = table.shape[1], embedding.block, portable
        grid = grid_of(table, self.block, symmetric=True)
        integers = quantise(table, self.block, grid).flatten(1)
        self.register_buffer("weight", pack(integers if whole else integers[:, : self.dim + self.dim % 2]))
        self.register_buffer("scale", grid.scale)

    def forward(self, ids: Tensor) -> Tensor:
        if self.portable:
            return self._rows(F.embedding(ids, self.weight), F.embedding(ids, self.scale))
        attributes: Attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block, "bits": 4}
        shape = [*ids.shape, 2 * self.weight.shape[1]]
        name = "com.microsoft::GatherBlockQuantized"
        inputs: list[Tensor | None] = [self.weight, ids, self.scale]
        rows = torch.onnx.ops.symbolic(name, inputs, attributes, dtype=torch.float32, shape=shape, version=1)
        return rows if shape[-1] == self.dim else rows[..., : self.dim]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., dim) times all rows of a table of whole blocks, (..., rows): one `MatMulNBits`, unless `portable`."""
        if self.portable:
            return F.linear(x, self._rows(self.weight, self.scale), bias)
        rows, blocks = self.scale.shape
        packed = self.weight.view(rows, blocks, self.block // 2)
        inputs: list[Tensor | None] = [x, packed, self.scale, *([] if bias is None else [None, None, bias])]
        attributes: Attributes = {"K": self.dim, "N": rows, "bits": 4, "block_size": self.block}
        name, shape = "com.microsoft::MatMulNBits", [*x.shape[:-1], rows]
        return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=torch.float32, shape=shape, version=1)

    def _rows(self, packed: Tensor, scale: Tensor) -> Tensor:
        """The values of packed rows; bytes are taken apart in fp32: exact, and known to every runtime."""
        pairs = packed.to(torch.float32)
        upper = torch.floor(pairs / 16.0)
        values = torch.stack([pairs - 16.0 * upper, upper], dim=-1).flatten(-2) - ZERO
        # Not by scales repeated: the exporter would write them down.
        values = F.pad(values, (0, -values.shape[-1] % self.block)).unflatten(-1, (-1, self.block)) * scale[..., None]
        return values.flatten(-2)[..., : self.dim]
