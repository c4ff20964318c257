"""What a compressed model may cost (milliseconds, parameters, bytes) and the shapes that lose least for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from compressft.anatomy import Layer, anatomy, linear_shape
from compressft.errors import UserError

if TYPE_CHECKING:
    from compressft.transform import Context

KINDS = ("latency_ms", "speedup", "parameters", "bytes", "sparsity")
# Cells of the cost axis; each of a model's parts rounds up by less than one.
CELLS = 20_000

Shape = Mapping[str, int]
Precision = Literal["int8", "fp32"]


class Target(BaseModel):
    """How small or fast the model has to become: exactly one of the five quantities.

    Fields: `latency_ms`: median milliseconds of the exported model at `batch` x `length` on this machine.
    `speedup`: the same as a factor over the fp32 ONNX of the recipe's model, as reports state it. `parameters`: number
    of parameters, or (up to 1) the fraction of the recipe's model's. `bytes`: of the exported model's tensors.
    `sparsity`: fraction of the heads' and FFN neurons' weights to remove, in [0, 1). `precision`: arithmetic of the
    model that ships, for `latency_ms`, `speedup` and `bytes`; None: what the recipe ends with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    latency_ms: float | None = Field(default=None, gt=0)
    speedup: float | None = Field(default=None, ge=1)
    parameters: float | None = Field(default=None, gt=0)
    bytes: int | None = Field(default=None, gt=0)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=128, ge=1)
    precision: Precision | None = None

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; got {given or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """The quantity that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def timed(self) -> bool:
        """Whether costs have to be measured."""
        return self.kind in ("latency_ms", "speedup")

    def budget(self, table: CostTable, base: Sequence[Shape]) -> float:
        """What the model may cost, in the table's unit.

        Args:
            base: shapes of the uncompressed model, for the relative targets.
        """
        value = float(getattr(self, self.kind))
        if self.kind == "speedup":
            return (table.cost(base) if table.reference is None else table.reference) / value
        if self.kind == "sparsity":
            return table.cost(base) * (1.0 - value)
        if self.kind == "parameters" and value <= 1:
            return table.cost(base) * value
        return value


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


# Tables that need no measuring.


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
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        weight = own.pop("weight", None)
        if weight is not None and weight.dim() == 2:
            rows = weight.shape[1] if type(part).__name__ == "Conv1D" else weight.shape[0]
            total += weight.numel() + 4 * rows
        elif weight is not None:
            total += 4 * weight.numel()
        total += 4 * sum(p.numel() for p in own.values())
    return float(total)


# The choice.


def choose(
    table: CostTable,
    budget: float,
    attention_loss: Sequence[Mapping[int, float]],
    ffn_loss: Sequence[Mapping[int, float]],
    modules: bool = False,
) -> list[dict[str, int]]:
    """The shapes with the least summed loss that cost no more than the budget.

    Dynamic programming over the layers on a cost axis of `CELLS` cells (Frantar & Alistarh, "SPDY", 2022, algorithm 1),
    exact but for that rounding: the budget always holds, and nothing that is cheaper by a cell per part loses less.
    Cells do not depend on the budget: with more of it the loss never grows. Where the last layer has costs of its own,
    every layer that may end up as the last one is tried as such.

    Args:
        attention_loss, ffn_loss: per layer {KV groups or neurons: loss}; the keys are the sizes that may be chosen.
            Size 0 in both lets the layer go.
        modules: size 0 of one part alone may be chosen too.

    Returns:
        per layer {"kv_heads", "ffn"}.

    Raises:
        UserError: even the cheapest choice costs more.
    """
    depth = len(ffn_loss)
    step = _most(table, attention_loss, ffn_loss) / CELLS
    found: list[tuple[float, list[dict[str, int]]]] = []
    cheapest: list[float] = []
    for end in range(depth, 0, -1):
        cut = attention_loss[:end], ffn_loss[:end]
        chosen, least = _choose(table, budget, *cut, modules, step)
        gone = [{"kv_heads": 0, "ffn": 0}] * (depth - end)
        cheapest.append(least)
        if chosen is not None:
            shapes = [*chosen, *gone]
            found.append((_loss(shapes, attention_loss, ffn_loss), shapes))
        if table.last is None or 0 not in attention_loss[end - 1] or 0 not in ffn_loss[end - 1]:
            break
    if not found:
        raise UserError(
            f"target: {_amount(table, budget)} cannot be reached: the smallest model that may be chosen takes "
            f"{_amount(table, min(cheapest))}; ask for no less, lower the floors or let whole layers go"
        )
    return min(found, key=lambda one: one[0])[1]


def _loss(
    shapes: Sequence[Shape], attention: Sequence[Mapping[int, float]], ffn: Sequence[Mapping[int, float]]
) -> float:
    return sum(a[s["kv_heads"]] + f[s["ffn"]] for s, a, f in zip(shapes, attention, ffn, strict=True))


def _choose(
    table: CostTable,
    budget: float,
    attention_loss: Sequence[Mapping[int, float]],
    ffn_loss: Sequence[Mapping[int, float]],
    modules: bool,
    step: float,
) -> tuple[list[dict[str, int]] | None, float]:
    """The best affordable shapes, if any, with the last of these layers as the last; and the least possible cost."""
    # Parts round up to whole cells: what the budget allows may end that many cells above it.
    above = 2 * len(ffn_loss)
    best = np.zeros(CELLS + above + 1)
    trail: list[Steps] = []
    counted_in = table.costs(len(ffn_loss))
    for own, attention, ffn in zip(counted_in, attention_loss, ffn_loss, strict=True):
        heads, neurons = _sizes(attention, modules), _sizes(ffn, modules)
        costs = [_cells(own.attention_cost(n) + own.layer, step) for n in heads]
        middle, from_heads = _add(best, costs, [attention[n] for n in heads])
        after, from_neurons = _add(middle, [_cells(own.ffn_cost(n), step) for n in neurons], [ffn[n] for n in neurons])
        gone = np.zeros(len(best), dtype=bool)
        if 0 in attention and 0 in ffn:
            without = best + (attention[0] + ffn[0])
            gone = without <= after
            after = np.where(gone, without, after)
        trail.append((own, heads, from_heads, neurons, from_neurons, gone))
        best = after
    top = min(math.floor((budget - table.rest) / step) + above, len(best) - 1)
    candidates = [_follow(step, trail, c) for c in range(max(top - above, 0), top + 1) if np.isfinite(best[c])]
    affordable = [c for c in candidates if table.cost(c) <= budget * (1 + 1e-9)]
    least = table.cost(_follow(step, trail, int(np.isfinite(best).argmax())))
    # Losses fall with the cells.
    return (affordable[-1] if affordable else None), least


# Of one layer, in the order of the dynamic programme: its costs, sizes and chosen index per cell of its parts; whether
# it goes.
Steps = tuple[LayerCosts, list[int], np.ndarray, list[int], np.ndarray, np.ndarray]


def _cells(cost: float, step: float) -> int:
    return math.ceil(cost / step - 1e-6)


def _sizes(loss: Mapping[int, float], modules: bool) -> list[int]:
    return sorted(n for n in loss if n > 0 or modules)


def _most(table: CostTable, attention: Sequence[Mapping[int, float]], ffn: Sequence[Mapping[int, float]]) -> float:
    """Cost of the largest choice, less `rest`."""
    largest = [
        table.attention_cost(max(a)) + table.ffn_cost(max(f)) + table.layer for a, f in zip(attention, ffn, strict=True)
    ]
    return max(sum(largest), 1e-30)


def _add(best: np.ndarray, costs: Sequence[int], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Least loss within each number of cells after one more part, and which of its sizes gives it."""
    after = np.full_like(best, np.inf)
    which = np.full(len(best), -1, dtype=np.int32)
    for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if cost < len(best):
            value = best[: len(best) - cost] + loss
            better = value < after[cost:]
            after[cost:][better] = value[better]
            which[cost:][better] = index
    return after, which


def _follow(step: float, trail: Sequence[Steps], cell: int) -> list[dict[str, int]]:
    chosen: list[dict[str, int]] = []
    for own, heads, from_heads, neurons, from_neurons, gone in reversed(trail):
        if gone[cell]:
            chosen.append({"kv_heads": 0, "ffn": 0})
            continue
        f = neurons[from_neurons[cell]]
        cell -= _cells(own.ffn_cost(f), step)
        a = heads[from_heads[cell]]
        cell -= _cells(own.attention_cost(a) + own.layer, step)
        chosen.append({"kv_heads": a, "ffn": f})
    return chosen[::-1]


def _amount(table: CostTable, value: float) -> str:
    unit = table.about.get("unit", "")
    return f"{value:.3g} ms" if unit == "milliseconds" else f"{value:,.0f} {unit}".strip()


def sizes_allowed(size: int, align: int, floor: int) -> list[int]:
    """`size` and the multiples of `align` below it that are at least `floor`, ascending."""
    return [n for n in range(align, size, align) if n >= floor] + [size]


def choose_by_importance(
    table: CostTable,
    budget: float,
    heads: Sequence[Tensor],
    ffn: Sequence[Tensor],
    align: int = 1,
    floor_heads: int = 1,
    floor_ffn: int = 1,
) -> list[dict[str, int]]:
    """Shapes that keep as much importance as the budget allows.

    Args:
        heads, ffn: per layer the importance of each KV group (groups,) and neuron (neurons,), at least 0 and in one
            unit: what is lost counts the same wherever it is lost. Layers keep their highest scores.

    Returns:
        per layer {"kv_heads", "ffn"}. Raises as `choose`.
    """
    attention_loss = [_lost(score, sizes_allowed(len(score), 1, floor_heads)) for score in heads]
    ffn_loss = [_lost(score, sizes_allowed(len(score), align, floor_ffn)) for score in ffn]
    return choose(table, budget, attention_loss, ffn_loss)


def _lost(score: Tensor, sizes: Sequence[int]) -> dict[int, float]:
    ascending = score.detach().double().cpu().sort().values.cumsum(0).tolist()
    return {n: ascending[len(ascending) - n - 1] if n < len(ascending) else 0.0 for n in sizes}


def cost_table(model: nn.Module, target: Target, context: Context, who: str) -> tuple[CostTable, float]:
    """The table that a target counts in, and the budget in its unit.

    Raises:
        UserError: costs would have to be measured and nothing here can; or the model ships in an arithmetic without a
            table. `who` names the setting's owner.
    """
    precision: Any = target.precision or context.ships
    if precision not in ("int8", "fp32") and target.kind in ("latency_ms", "speedup", "bytes"):
        raise UserError(
            f"{who}.target.{target.kind}: the recipe's model ships in {precision}, whose costs are not tabulated; "
            "set target.precision to int8 or fp32 to count in that"
        )
    if not target.timed:
        table = counted(model, target.kind, precision)
    elif context.latency is None:
        raise UserError(f"{who}.target.{target.kind}: has to be measured; run it in a recipe's stage")
    else:
        table = context.latency(target, precision)
    base = context.base or [{"kv_heads": layer.kv_heads, "ffn": layer.ffn} for layer in anatomy(model).layers]
    return table, target.budget(table, base)
