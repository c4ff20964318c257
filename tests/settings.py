"""One row per method, pass and objective: settings with which it does something to a tiny model in a few steps.

Tests that ask the same of every entry read these rows; what an entry's own tests vary stays with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressft import methods, objectives, passes
from compressft.transform import Transform

FAST = {"start": 0.0, "end": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "probe": {"cache": False},
    "layers": {"top": 1},
    "adapter": {"size": 4},
    # Two saved adapters of the very model, which the test brings.
    "fusion": {"dropout": 0.0},
    "side": {},
    "scalar_mix": {},
    "prefix": {"length": 3, "hidden": 8},
    "peft": {"config": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}},
    "mask": {},
    "diff": {"density": 0.1, "end": 0.5},
    "task_vector": {"encoding": "int8"},
    "head_gates": {"decide": "importance", "heads": 0.5, **FAST},
    "lsh_attention": {"chunk": 4, "rounds": 2},
}
PASSES: dict[str, dict[str, Any]] = {
    "structured": {"heads": 0.5, "ffn": 0.5, "align": 8, "floor_ffn": 8, **FAST},
    "ziplm": {"target": {"sparsity": 0.4}, "align": 8, "floor_ffn": 8},
    "int8": {},
    "int4": {"embeddings": "int4"},
    "nf4": {},
    "vocabulary": {},
    "depth": {"keep": [1]},
    "magnitude": {"sparsity": 0.6, **FAST},
    "movement": {"sparsity": 0.6, **FAST},
    # A tiny model learns nothing of a penalty in a few steps at the paper's rate.
    "l0": {"penalty": 30.0, "learning_rate": 3.0, "end": 0.5},
    "block": {"sparsity": 0.6, "tile": 8, **FAST},
    "n_m": FAST,
    "wanda": {"sparsity": 0.6},
    "sparsegpt": {"sparsity": 0.6},
}
OBJECTIVES: dict[str, dict[str, Any]] = {"distill": {"teacher": "self", "hidden": 1.0}}
ROWS = ((METHODS, methods.METHODS), (PASSES, passes.PASSES), (OBJECTIVES, objectives.OBJECTIVES))


def fields(name: str, adapters: Sequence[str] = ()) -> dict[str, Any]:
    """An entry's row as a recipe has it."""
    row = next(rows[name] for rows, _ in ROWS if name in rows)
    return {"type": name, **row, **({"adapters": tuple(adapters)} if name == "fusion" else {})}


def made(name: str, adapters: Sequence[str] = ()) -> Transform:
    """The entry itself."""
    kind = next(registry[name] for _, registry in ROWS if name in registry)
    return kind(**fields(name, adapters))
