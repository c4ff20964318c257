"""What a model's parts cost by size: tables that add up to a model's milliseconds, parameters or bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from compressft.model.anatomy import Layer, anatomy, linear_shape

Shape = Mapping[str, int]
Precision = Literal["int8", "fp32"]


class LayerCosts(BaseModel):
    """Costs of a layer's parts by size.

    `groups`, `neurons`: ascending sizes, at least 1; `attention`, `ffn`: their costs (milliseconds, parameters or
    bytes), linear in between; a part of size 0 is gone and costs nothing. `layer`: what a layer costs besides, as
    long as either part is there.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    groups: tuple[int, ...] = Field(min_length=1)
    attention: tuple[float, ...]
    neurons: tuple[int, ...] = Field(min_length=1)
    ffn: tuple[float, ...]
    layer: float = 0.0

    @model_validator(mode="after")
    def _grids(self) -> LayerCosts:
        for sizes, costs in ((self.groups, self.attention), (self.neurons, self.ffn)):
            if len(sizes) != len(costs):
                raise ValueError(f"{len(sizes)} sizes with {len(costs)} costs")
            if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
                raise ValueError(f"sizes {sizes} do not ascend from at least 1")
            if costs[0] < 0 or any(a > b for a, b in pairwise(costs)):
                raise ValueError(f"costs {costs} fall somewhere; smooth them first")
        return self

    def attention_cost(self, groups: int) -> float:
        """Cost of an attention with this many KV groups."""
        return _between(self.groups, self.attention, groups)

    def ffn_cost(self, neurons: int) -> float:
        """Cost of an FFN with this many neurons."""
        return _between(self.neurons, self.ffn, neurons)

    def layer_cost(self, shape: Shape) -> float:
        """Cost of a layer {"kv_heads", "ffn"}; nothing where both are 0."""
        present = bool(shape["kv_heads"] or shape["ffn"])
        return self.attention_cost(shape["kv_heads"]) + self.ffn_cost(shape["ffn"]) + self.layer * present


class CostTable(LayerCosts):
    """Costs of a model: those of its layers add up.

    `last`: the last layer's costs where they differ (an exported classifier computes it for one token); None: as all.
    `rest`: embeddings, pooler and head. `reference`: cost of the uncompressed fp32 model, which speedups count from
    (None: that of the base's shapes in this table). `about`: where the numbers come from.
    """

    last: LayerCosts | None = None
    rest: float = 0.0
    reference: float | None = None
    about: dict[str, Any] = Field(default_factory=dict)

    def costs(self, depth: int) -> list[LayerCosts]:
        """What each of so many layers is counted in."""
        return [self] * depth if self.last is None or depth == 0 else [*[self] * (depth - 1), self.last]

    def cost(self, shapes: Sequence[Shape]) -> float:
        """Cost of a model.

        Args:
            shapes: per layer {"kv_heads", "ffn"}, as `shrink.shapes` gives them; one whose sizes are 0 is gone.
        """
        there = [shape for shape in shapes if shape["kv_heads"] or shape["ffn"]]
        return self.rest + sum(one.layer_cost(s) for one, s in zip(self.costs(len(there)), there, strict=True))


def _between(sizes: Sequence[int], costs: Sequence[float], size: int) -> float:
    """Linear between grid points and, by the outermost slope, beyond the largest; flat below the smallest."""
    if size <= 0:
        return 0.0
    if size > sizes[-1]:
        if len(sizes) == 1:
            return costs[-1] * size / sizes[-1]
        return costs[-1] + (size - sizes[-1]) * (costs[-1] - costs[-2]) / (sizes[-1] - sizes[-2])
    return float(np.interp(size, sizes, costs))


def monotone(values: Sequence[float]) -> list[float]:
    """The closest non-decreasing sequence in least squares (isotonic regression, pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] > mean:
            before, number = blocks.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def counted(model: nn.Module, kind: str, precision: Precision = "fp32") -> CostTable:
    """The table of a model's "parameters", tensor "bytes" or prunable weights ("sparsity"), from its shapes.

    Bytes are those of the exported tensors: int8 stores linear weights and embedding tables in one byte with an fp32
    scale per row, everything else in four; the graph itself takes some hundred kilobytes more.
    """
    parts = anatomy(model)
    first = parts.layers[0]
    group, neuron = _units(first, kind, precision)
    layer = rest = 0.0
    if kind != "sparsity":
        layer = _size(first.module, kind, precision) - group * first.kv_heads - neuron * first.ffn
        rest = _size(model, kind, precision) - sum(_size(x.module, kind, precision) for x in parts.layers)
    return CostTable(
        groups=(1,), attention=(group,), neurons=(1,), ffn=(neuron,), layer=layer, rest=rest, about={"unit": kind}
    )


def _weight(columns: int, bias: bool, kind: str, precision: Precision) -> int:
    """Cost of one row of a linear weight (out, in)."""
    if kind == "sparsity":
        return columns
    if kind == "parameters":
        return columns + bias
    return columns + 4 + 4 * bias if precision == "int8" else 4 * (columns + bias)


def _units(layer: Layer, kind: str, precision: Precision) -> tuple[float, float]:
    """Cost of one KV group (its projections' rows, its columns of `o`) and of one neuron."""
    family = layer.family

    def row(path: str) -> int:
        module = layer.part(path)
        return _weight(linear_shape(module)[0], getattr(module, "bias", None) is not None, kind, precision)

    def column(path: str) -> int:
        rows = linear_shape(layer.part(path))[1]
        return 4 * rows if kind == "bytes" and precision == "fp32" else rows

    width = layer.head_dim * layer.heads // layer.kv_heads
    rows = {family.q: width, family.k: layer.head_dim, family.v: layer.head_dim, family.fused_qkv: 3 * width}
    group = sum(rows[path] * row(path) for path in layer.projections) + width * column(family.o)
    return float(group), float(sum(row(path) for path in family.up) + column(family.down))


def _size(module: nn.Module, kind: str, precision: Precision) -> float:
    """Parameters, or bytes of the exported tensors, of a part of the model."""
    if kind == "parameters":
        return float(sum(p.numel() for p in module.parameters()))
    if precision == "fp32":
        return 4.0 * sum(p.numel() for p in module.parameters())
    total = 0
    seen: set[nn.Parameter] = set()
    for part in module.modules():
        # A tied table ships once.
        own = {name: one for name, one in part.named_parameters(recurse=False) if one not in seen}
        seen.update(own.values())
        weight = own.pop("weight", None)
        if weight is not None and weight.dim() == 2:
            rows = weight.shape[1] if type(part).__name__ == "Conv1D" else weight.shape[0]
            total += weight.numel() + 4 * rows
        elif weight is not None:
            total += 4 * weight.numel()
        total += 4 * sum(p.numel() for p in own.values())
    return float(total)
