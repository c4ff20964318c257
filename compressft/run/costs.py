"""What parts of the recipe's model cost on this machine, measured when first asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from compressft.export.cache import has_cache
from compressft.export.flow import sample_batch
from compressft.export.table import Deployment, measure_reference, measure_shapes, measure_table
from compressft.model.costs import CostTable
from compressft.model.load import load_empty
from compressft.model.shrink import shapes
from compressft.passes.int8 import Int8
from compressft.passes.shared.target import Target
from compressft.run.feed import Feeds
from compressft.run.records import Run
from compressft.transform import QUANTISES

# Ratio of the slowest to the quietest round from which a cost table is doubtful.
BUSY = 1.2


def known_costs(run: Run, model: nn.Module, feeds: Feeds) -> dict[str, Any]:
    """What `Context` says of costs: the uncompressed model's shapes, the shipped arithmetic, and measured tables.

    A table is measured when it is first asked for, once per run directory.
    """
    recipe, folder, console, rows = run.recipe, run.folder, run.console, feeds.shipped
    # Stages change the model in place: what the closure needs of it is taken now.
    timed: Any = model
    if feeds.of(recipe.stages[0]).task.key != rows.task.key:
        timed = load_empty(recipe.model, rows.task.auto_class, **rows.task.model_arguments())
    architecture, config, options = type(timed), copy.deepcopy(timed.config), recipe.export
    quantisers = [p for stage in recipe.stages for p in stage.passes if p.order == QUANTISES]

    def deployment(precision: str) -> Deployment:
        int8 = next((p for p in reversed(quantisers) if isinstance(p, Int8)), Int8())
        return Deployment(
            architecture,
            config,
            sample_batch(rows.task, {"train": rows.train}),
            int8 if precision == "int8" else None,
            options.attention,
            options.threads,
            options.latency_rounds,
            has_cache(recipe),
        )

    def latency(target: Target, precision: str) -> CostTable:
        def compute() -> dict[str, Any]:
            console.print("measuring what heads and neurons cost on this machine", highlight=False)
            ships = deployment(precision)
            table = measure_table(ships, target.batch, target.length)
            reference = measure_reference(ships, target.batch, target.length, table.about["between_nodes"])
            rounds = table.about.get("rounds") or [1.0]
            if max(rounds) > BUSY * min(rounds):
                times = ", ".join(f"{ms:.2f}" for ms in rounds)
                console.print(
                    f"this machine is busy: the same model took {times} ms; milliseconds may be off, "
                    "shapes chosen by them too",
                    highlight=False,
                )
            return {**table.model_dump(mode="json"), "reference": reference}

        key = f"latency-{target.batch}x{target.length}-{precision}"
        return CostTable.model_validate(folder.memo(key, compute))

    def whole(target: Target, precision: str, layers: Sequence[Mapping[str, int]]) -> float:
        between = latency(target, precision).about["between_nodes"]
        return measure_shapes(deployment(precision), layers, target, between)

    ships = quantisers[-1].type if quantisers else "fp32"
    return {"base": shapes(model), "ships": ships, "latency": latency, "whole": whole}
