"""How many bytes a run still has to write, by what is there: to start what cannot be saved wastes hours."""

from __future__ import annotations

from pathlib import Path

from compressft.recipe.recipe import Recipe
from compressft.transform import QUANTISES

# Weights and two optimiser moments, twice for a while, and what is saved of them at the end.
TRAINING = 8
# The file's share of its weights' bytes, where a pass quantises them.
QUANTISED = 0.25
# Folders that are written again whenever a run ends.
SHIPS = ("model", "delta", "onnx")


def training_bytes(root: Path, model_bytes: int) -> int:
    """Where steps are left to train; checkpoints that are there make room for the next ones."""
    return max(TRAINING * model_bytes - _bytes(root / "checkpoints"), 0)


def shipping_bytes(root: Path, recipe: Recipe, model_bytes: int) -> int:
    """Where all steps are trained: the last stage if it is not saved yet, model/, delta/, onnx/ and what is measured.

    A folder that is there is replaced by its like: it frees as much, but only once the new one is whole.

    Args:
        model_bytes: of the uncompressed model.
    """
    last = root / "stages" / recipe.stages[-1].name
    weights = sum(path.stat().st_size for path in last.glob("*.safetensors")) or model_bytes
    sizes = {f"stages/{last.name}": weights, "model": weights, "delta": weights}
    measuring = 0
    if recipe.export.enabled:
        quantised = any(one.order == QUANTISES for stage in recipe.stages for one in stage.passes)
        sizes["onnx"] = int(weights * QUANTISED) if quantised else weights
        dense = any(not stage.passes for stage in recipe.stages)
        measuring = model_bytes if dense else 2 * model_bytes
    new = sum(size for name, size in sizes.items() if not (root / name).is_dir())
    replaced = max((size for name, size in sizes.items() if name in SHIPS and (root / name).is_dir()), default=0)
    return new + max(replaced, measuring)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
