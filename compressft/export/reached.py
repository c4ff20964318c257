"""What a recipe's target asked for, and what the file that was measured has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from compressft.model.costs import counted
from compressft.model.shrink import shapes
from compressft.passes.shared.target import Target
from compressft.recipe.recipe import Recipe

# Of these less is better.
LEAST = ("latency_ms", "parameters", "bytes")
# Share by which a count may be off: fractions are rounded.
SLACK = 0.001
# Ratio from which more was removed than was asked for.
BEYOND = 1.1


@dataclass(frozen=True)
class Reached:
    """A target and what came of it, in the target's quantity; `batch` and `length` where it is measured in a shape."""

    target: str
    asked: float
    reached: float
    batch: int | None = None
    length: int | None = None

    @property
    def ratio(self) -> float:
        """Above 1: more than was asked for."""
        if self.target == "sparsity":
            # Of what is left, which is what costs.
            return (1 - self.asked) / max(1 - self.reached, 1e-9)
        return self.asked / self.reached if self.target in LEAST else self.reached / self.asked

    def row(self) -> dict[str, object]:
        """As it stands in report.json."""
        return asdict(self)

    def note(self) -> str | None:
        """A sentence where it is missed, or far surpassed."""
        at = "" if self.batch is None else f" at {self.batch}x{self.length}"
        said = f"target.{self.target}: {self.asked:g} was asked for{at}, {self.reached:.3g} was measured."
        if self.ratio < (1 if at else 1 - SLACK):
            return said + (
                " Shapes follow from costs measured before training; if the machine was busy, export again to measure "
                "the file again, or train again to choose other shapes."
                if at
                else " More has to be removed: lower the floors, or let the pass take more parts."
            )
        if self.ratio > BEYOND:
            return said + " More was removed than that needs; ask for less, and quality comes back."
        return None


def last_targets(recipe: Recipe) -> list[Target]:
    """The targets of the last stage that has any: those of the file, where earlier ones were on the way."""
    for stage in reversed(recipe.stages):
        found = [target for one in stage.passes if isinstance(target := getattr(one, "target", None), Target)]
        if found:
            return found
    return []


def shapes_to_time(recipe: Recipe) -> list[tuple[int, int]]:
    """(batch, length) that are measured: the recipe's, and those that a target counts in."""
    # A smoke run neither trains enough nor measures long enough for its targets.
    timed = [] if recipe.smoke else [target for target in last_targets(recipe) if target.timed]
    return list(dict.fromkeys([*recipe.export.latency_shapes, *((target.batch, target.length) for target in timed)]))


def reached(
    recipe: Recipe, model: nn.Module, report: Mapping[str, Any], base: Sequence[Mapping[str, int]]
) -> list[Reached]:
    """Every target of the file next to what it has; what was not measured is left out.

    Args:
        model: that ships.
        report: with `latency_ms`, `parameters` and `size_bytes`.
        base: shapes of the recipe's model.
    """
    found = []
    for target in [] if recipe.smoke else last_targets(recipe):
        asked, value = float(getattr(target, target.kind)), _value(target, model, report, base)
        if value is not None:
            shape = (target.batch, target.length) if target.timed else (None, None)
            found.append(Reached(target.kind, asked, value, *shape))
    return found


def _value(
    target: Target, model: nn.Module, report: Mapping[str, Any], base: Sequence[Mapping[str, int]]
) -> float | None:
    if target.timed:
        return _timed(target, report["latency_ms"])
    if target.kind == "bytes":
        return report["size_bytes"]["onnx_tensors"]
    if target.kind == "parameters":
        total = report["parameters"]["total"]
        return total / report["parameters"]["base"] if float(target.parameters or 0) <= 1 else total
    table = counted(model, "sparsity")
    return 1 - table.cost(shapes(model)) / table.cost(base)


def _timed(target: Target, rows: Sequence[Mapping[str, Any]]) -> float | None:
    times = {(row["runtime"], row["model"], row["batch"], row["length"]): row["p50"] for row in rows}
    shape = (target.batch, target.length)
    own, base = (times.get(("onnxruntime", name, *shape)) for name in ("compressed", "base_fp32"))
    if own is None or base is None:
        return None
    return own if target.kind == "latency_ms" else base / own
