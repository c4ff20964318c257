"""What pruning, quantisation and distillation cost and gain on real data: accuracy of files, not of intentions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, run_cases

RESULTS = Path(__file__).parent / "results" / "compression.json"
SUITE = "compression"


def sst2() -> dict[str, Any]:
    """Sentences of the Stanford Sentiment Treebank; test is its own test split."""
    files = {"train": "train_sentences", "validation": "validation", "test": "test"}
    return {"max_length": 64, **{name: f"{{data}}/sst2/{file}.jsonl" for name, file in files.items()}}


def banking77() -> dict[str, Any]:
    """All of BANKING77."""
    return {"max_length": 64, "train": "{data}/banking77/train.jsonl", "test": "{data}/banking77/test.jsonl"}


DATA = {"sst2": sst2, "banking77": banking77}
TEACHER = {"sst2": {"epochs": 3, "learning_rate": 1e-4}, "banking77": {"epochs": 4, "learning_rate": 2e-4}}


def teacher(task: str) -> Case:
    """The dense model, fine-tuned: what all others of the task are compared with and taught by."""
    recipe = {
        "name": f"{task}-teacher",
        "model": "minilm",
        "data": DATA[task](),
        "stages": [{"name": "teacher", "train": TEACHER[task]}],
        "export": {"enabled": False},
    }
    return Case(f"{task}-teacher", "teacher", recipe, keep=True)


def student(
    name: str,
    group: str,
    task: str,
    passes: Sequence[dict[str, Any]],
    train: dict[str, Any],
    distill: dict[str, Any] | None = None,
    export: dict[str, Any] | None = None,
    **facts: Any,
) -> Case:
    """The teacher's weights, compressed while they are trained on."""
    source = f"{{{task}-teacher}}/model"
    terms = {"type": "distill", "teacher": source, **distill} if distill is not None else None
    stage = {"name": "student", "passes": list(passes), "train": train, "objectives": [terms] if terms else []}
    recipe = {
        "name": name,
        "model": source,
        "data": DATA[task](),
        "stages": [stage],
        "export": export or {"enabled": False},
    }
    return Case(name, group, recipe, (f"{task}-teacher",), keep=export is not None, facts={"task": task, **facts})


def cases() -> list[Case]:
    """All of them."""
    return [teacher("sst2"), teacher("banking77")]


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks compression`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compression", description=__doc__)
    parser.add_argument("groups", nargs="*", help="groups or names of cases (default: all)")
    options = parser.parse_args(arguments)
    everything = cases()
    wanted = [c for c in everything if not options.groups or {c.group, c.name} & set(options.groups)]
    run_cases(SUITE, everything, wanted, RESULTS, Console(stderr=True))
    return 0
