"""The shapes that lose least within a budget that a table of costs counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compressft.errors import UserError
from compressft.model.costs import CostTable, LayerCosts, Shape

# Cells of the cost axis; each of a model's parts rounds up by less than one.
CELLS = 20_000
# Choices that are measured at most, the share of a budget that is close enough to it, and the factor between table and
# measurement that is believed at most.
TRIALS, CLOSE, FARTHEST = 3, 0.93, 3.0


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
        cut = Losses(attention_loss[:end], ffn_loss[:end])
        chosen, least = _choose(table, budget, cut, modules, step)
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


@dataclass(frozen=True)
class Trial:
    """A choice, what the table says that it costs, and what a whole model of these shapes was measured to cost."""

    shapes: list[dict[str, int]]
    cost: float
    measured: float


def tried(
    choosing: Callable[[float], list[dict[str, int]]],
    table: CostTable,
    budget: float,
    measure: Callable[[Sequence[Shape]], float],
) -> list[Trial]:
    """Choices whose measured cost comes closer to the budget, which the table's sum of parts may be far from.

    Each is made for what the table would say of a model that takes the budget, as the one before shows: parts that
    ran one after the other in a large model take more, or less, than in a small one whose weights stay in a cache.

    Args:
        choosing: the best shapes that the table says cost no more than its argument.
        measure: cost of a whole model.

    Raises:
        UserError: even the cheapest choice costs more, by the table.
    """
    trials: list[Trial] = []
    most = budget
    for _ in range(TRIALS):
        try:
            shapes = choosing(most)
        except UserError:
            if not trials:
                raise
            break
        if any(shapes == one.shapes for one in trials):
            break
        trials.append(Trial(shapes, table.cost(shapes), measure(shapes)))
        last = trials[-1]
        if CLOSE * budget <= last.measured <= budget:
            break
        most = budget * min(max(last.cost / last.measured, 1 / FARTHEST), FARTHEST)
    return trials


def best(trials: Sequence[Trial], budget: float) -> Trial:
    """The one that takes the most of the budget; where none holds it, the cheapest."""
    holding = [one for one in trials if one.measured <= budget]
    return max(holding, key=lambda one: one.measured) if holding else min(trials, key=lambda one: one.measured)


def _loss(
    shapes: Sequence[Shape], attention: Sequence[Mapping[int, float]], ffn: Sequence[Mapping[int, float]]
) -> float:
    return sum(a[s["kv_heads"]] + f[s["ffn"]] for s, a, f in zip(shapes, attention, ffn, strict=True))


@dataclass(frozen=True)
class Losses:
    """Per layer what each size that may be chosen loses: {KV groups or neurons: loss}."""

    attention: Sequence[Mapping[int, float]]
    ffn: Sequence[Mapping[int, float]]


def _choose(
    table: CostTable, budget: float, losses: Losses, modules: bool, step: float
) -> tuple[list[dict[str, int]] | None, float]:
    """The best affordable shapes, if any, with the last of these layers as the last; and the least possible cost."""
    # Parts round up to whole cells: what the budget allows may end that many cells above it.
    above = 2 * len(losses.ffn)
    best = np.zeros(CELLS + above + 1)
    trail: list[Steps] = []
    counted_in = table.costs(len(losses.ffn))
    for own, attention, ffn in zip(counted_in, losses.attention, losses.ffn, strict=True):
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


@dataclass(frozen=True)
class Floors:
    """What a layer keeps at least, KV groups and neurons; FFN sizes are multiples of `align`."""

    align: int = 1
    heads: int = 1
    ffn: int = 1


LEAST = Floors()


def choose_by_importance(
    table: CostTable, budget: float, heads: Sequence[Tensor], ffn: Sequence[Tensor], floors: Floors = LEAST
) -> list[dict[str, int]]:
    """Shapes that keep as much importance as the budget allows.

    Args:
        heads, ffn: per layer the importance of each KV group (groups,) and neuron (neurons,), at least 0 and in one
            unit: what is lost counts the same wherever it is lost. Layers keep their highest scores.

    Returns:
        per layer {"kv_heads", "ffn"}. Raises as `choose`.
    """
    attention_loss = [_lost(score, sizes_allowed(len(score), 1, floors.heads)) for score in heads]
    ffn_loss = [_lost(score, sizes_allowed(len(score), floors.align, floors.ffn)) for score in ffn]
    return choose(table, budget, attention_loss, ffn_loss)


def _lost(score: Tensor, sizes: Sequence[int]) -> dict[int, float]:
    ascending = score.detach().double().cpu().sort().values.cumsum(0).tolist()
    return {n: ascending[len(ascending) - n - 1] if n < len(ascending) else 0.0 for n in sizes}
