"""Step time of each pass next to the plain distillation step, in interleaved rounds of one process."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from compressft.recipe.recipe import parse_recipe
from compressft.run.benchmark import training

DISTILL = {"temperature": 2.0, "task": 0.5, "logits": 0.5, "hidden": 1.0}
STRUCTURED = {"type": "structured", "heads": 0.5, "ffn": 0.5, "start": 0.0}
# Name -> passes of the stage; all of them distil.
STAGES: dict[str, list[Any]] = {
    "distillation": [],
    "vocabulary": ["vocabulary"],
    # Masks are drawn again at a tenth of the steps, as in runs of a thousand.
    "magnitude": [{"type": "magnitude", "sparsity": 0.9, "start": 0.0, "updates": 2}],
    "movement": [{"type": "movement", "sparsity": 0.9, "start": 0.0}],
    "l0": ["l0"],
    "block": [{"type": "block", "sparsity": 0.5, "start": 0.0}],
    "n_m": [{"type": "n_m", "start": 0.0, "updates": 2}],
    "structured": [STRUCTURED],
    "structured-learned": [{"type": "structured", "decide": "learned", "sparsity": 0.5, "start": 0.0}],
    "structured-target": [{"type": "structured", "target": {"sparsity": 0.5}, "start": 0.0}],
    "structured-all-parts": [{**STRUCTURED, "layers": 0.5, "hidden": 0.33}],
    "int8": ["int8"],
    "int4": ["int4"],
    "structured+int8": [STRUCTURED, "int8"],
    "movement+structured+int8": [{"type": "movement", "sparsity": 0.5, "start": 0.0}, STRUCTURED, "int8"],
    "vocabulary+structured+int8": ["vocabulary", STRUCTURED, "int8"],
    "vocabulary+movement+structured+int8": [
        "vocabulary",
        {"type": "movement", "sparsity": 0.5, "start": 0.0},
        STRUCTURED,
        "int8",
    ],
}


def overhead(
    model: str, data: dict[str, Any], rounds: int, steps: int, console: Console
) -> dict[str, dict[str, float]]:
    """{stage: {"step_ms": quietest round's, "ratio": to the plain distillation step}}.

    Args:
        model: folder of the dense model, which also teaches.
        data: the recipe's data part.
    """
    quietest: dict[str, float] = {}
    objective = {"type": "distill", "teacher": model, **DISTILL}
    for _ in range(rounds):
        for name, passes in STAGES.items():
            stage = {"name": "one", "objectives": [objective], "passes": passes}
            document = {"name": name, "model": model, "data": data, "stages": [stage]}
            ms = training(parse_recipe(document), steps)[0]["step_ms"]
            quietest[name] = min(ms, quietest.get(name, ms))
            console.print(f"{name}: {ms:.0f} ms a step", highlight=False)
    plain = quietest["distillation"]
    return {name: {"step_ms": ms, "ratio": ms / plain} for name, ms in quietest.items()}
