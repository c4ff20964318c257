"""Whether the file that was measured is as fast as the recipe asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compressft.recipe import Recipe
from compressft.target import Target


def timed_targets(recipe: Recipe) -> list[Target]:
    """The milliseconds and speed-ups that the recipe's passes were asked for."""
    found = [getattr(one, "target", None) for stage in recipe.stages for one in stage.passes]
    return [target for target in found if isinstance(target, Target) and target.timed]


def shapes_to_time(recipe: Recipe) -> list[tuple[int, int]]:
    """(batch, length) that are measured: the recipe's, and those that a target counts in."""
    # A smoke run neither trains enough nor measures long enough for its targets.
    asked = [] if recipe.smoke else [(target.batch, target.length) for target in timed_targets(recipe)]
    return list(dict.fromkeys([*recipe.export.latency_shapes, *asked]))


def missed(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each target that the file does not reach.

    Args:
        rows: the report's `latency_ms`.
    """
    times = {(row["runtime"], row["model"], row["batch"], row["length"]): row["p50"] for row in rows}
    found = []
    for target in timed_targets(recipe):
        shape = (target.batch, target.length)
        own, base = (times.get(("onnxruntime", name, *shape)) for name in ("compressed", "base_fp32"))
        if own is None or base is None:
            continue
        asked = getattr(target, target.kind)
        reached, short = (own, own > asked) if target.kind == "latency_ms" else (base / own, base / own < asked)
        if short:
            found.append(
                f"target.{target.kind}: {asked:g} was asked for at {target.batch}x{target.length}, {reached:.3g} was "
                "measured. Shapes follow from costs measured before training; if the machine was busy, export "
                "again to measure the file anew, or train again to choose other shapes."
            )
    return found
