"""The rows that are tried, and what torch says of them: computed once for each file, by the product's own code."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressft.evaluation.logits import batches_by_length, model_logits
from compressft.model.saved.compressed import load_compressed
from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import load_recipe
from compressft.run.again import finished_run
from compressft.run.feed import load_shipped

# Each row by itself, and in padded batches: other kernels run, and other ranges are found.
SIZES = (1, 8)
SEED = 0


@dataclass(frozen=True)
class Rows:
    """What a file is asked, and what torch answers.

    `batches` [{input: rows}] of all `SIZES` one after another; `members` the rows of each batch; `size` of each;
    `lengths` of the rows without padding; `torch` {batch size: logits of each row}; `kind` the task.
    """

    sha256: str
    bytes: int
    kind: str
    split: str
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    batches: tuple[dict[str, Any], ...]
    torch: dict[str, Any]


def sha256(file: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows_of(run: Path, number: int, cache: Path) -> Rows:
    """The rows of a finished run's file; a fixed sample of the split that its report is about.

    Args:
        cache: the folder where they are kept by the file's hash.
    """
    file = run / "onnx" / "model.onnx"
    digest = sha256(file)
    kept = cache / f"rows-{digest[:16]}-{number}.json"
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        staging = kept.with_suffix(".tmp")
        staging.write_text(json.dumps(asdict(_computed(run, number, digest))), encoding="utf-8")
        staging.rename(kept)
    found = json.loads(kept.read_text(encoding="utf-8"))
    return Rows(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def _computed(root: Path, number: int, digest: str) -> Rows:
    run = finished_run(root)
    recipe = load_recipe(run / "recipe.yaml")
    shipped = load_shipped(recipe, load_tokenizer(str(run / "model")))
    task, splits = shipped.task, shipped.splits
    split = splits.report_split
    features = task.encode(sample(getattr(splits, split), number))
    model = load_compressed(run / "model")
    batches: list[dict[str, Any]] = []
    members: list[tuple[int, ...]] = []
    sizes: list[int] = []
    answers = {}
    for size in SIZES:
        # A dynamic range is one of a batch: torch sees the very batches that the file sees.
        answers[str(size)] = [row.tolist() for row in model_logits(model, task, features, size)]
        for indices in batches_by_length([task.length(one) for one in features], size):
            padded = task.inputs([features[i] for i in indices])
            batches.append({name: tensor.tolist() for name, tensor in padded.items()})
            members.append(tuple(indices))
            sizes.append(size)
    lengths = tuple(len(feature["input_ids"]) for feature in features)
    weight = (run / "onnx" / "model.onnx").stat().st_size
    return Rows(digest, weight, task.type, split, lengths, tuple(sizes), tuple(members), tuple(batches), answers)


def sample(rows: Sequence[Any], number: int) -> list[Any]:
    """So many of them, always the same ones; all where there are fewer."""
    if len(rows) <= number:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(SEED).sample(range(len(rows)), number))]
