"""The files that are tried: those of the edge recipes, and a small one of every other kind, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, prepared
from benchmarks.edge import report
from compressft.errors import UserError, nearest
from compressft.recipe.recipe import load_recipe

SUITE = "portable"
# What is compared is decided here, on every machine; a run itself need not pass, and its times are of no interest.
EXPORT = {"label_agreement": 0.0, "metric_drop": 1.0, "latency_shapes": ((1, 32),), "latency_rounds": 1}
BANKING77 = {"sample": "banking77", "per_class": 50, "max_length": 64}
WNUT17 = {f: f"{{data}}/wnut17/{f}.jsonl" for f in ("train", "validation", "test")} | {"max_length": 64, "limit": 1500}
RTE = {"train": "{data}/rte/train.jsonl", "test": "{data}/rte/validation.jsonl"}
PAIRS = {**RTE, "columns": {"text": "text_a"}, "max_length": 96, "limit": 1500}
# A third of the layers' weights: an emulated machine is a hundred times as slow.
SMALL = (
    {"type": "depth", "keep": [1, 3, 5]},
    {"type": "structured", "heads": 0.5, "ffn": 0.75, "start": 0.0, "end": 0.4},
)
BASE = "portable-base"


def _stage(passes: list[dict[str, Any]], train: Mapping[str, Any], method: Mapping[str, Any] | None = None) -> Any:
    return {
        "name": "task",
        "method": dict(method or {"type": "full"}),
        "passes": passes,
        "train": {"save": "no", **train},
    }


def _case(name: str, model: str, data: Mapping[str, Any], stage: Mapping[str, Any], task: str | None = None) -> Case:
    recipe = {"name": name, "model": model, "data": dict(data), "stages": [stage], "export": EXPORT}
    recipe |= {"task": task} if task else {}
    return Case(name, "file", recipe, (BASE,) if BASE in model else (), keep=True)


def _on_base(name: str, one_pass: dict[str, Any], method: Mapping[str, Any] | None = None, rate: float = 1e-4) -> Case:
    """A third of MiniLM that knows BANKING77 already, quantised while it is trained on a little."""
    stage = _stage([one_pass], {"epochs": 1.5, "learning_rate": rate}, method)
    return _case(name, f"{{{BASE}}}/model", {**BANKING77, "limit": 800}, stage)


CASES: tuple[Case, ...] = (
    Case(
        BASE,
        "base",
        {
            "name": BASE,
            "model": "minilm",
            "data": BANKING77,
            "stages": [_stage([*SMALL], {"epochs": 5, "learning_rate": 3e-4})],
            "export": {"enabled": False},
        },
        keep=True,
    ),
    _on_base("static", {"type": "int8"}),
    _on_base("qdq", {"type": "int8", "format": "qdq"}),
    _on_base("dynamic", {"type": "int8", "ranges": "dynamic"}),
    _on_base("int4", {"type": "int4"}),
    _on_base("int4-rounded", {"type": "int4", "accuracy_level": 4}),
    _on_base("adapters", {"type": "int8"}, {"type": "adapter", "placement": "pfeiffer"}, 1e-3),
    _on_base("prefix", {"type": "int8"}, {"type": "prefix", "length": 10}, 1e-3),
    _case(
        "tokens",
        "minilm",
        WNUT17,
        _stage([*SMALL, {"type": "int8"}], {"epochs": 4, "learning_rate": 5e-4}),
        "token-classification",
    ),
    _case("pairs", "minilm", PAIRS, _stage([*SMALL, {"type": "int8"}], {"epochs": 5, "learning_rate": 3e-4})),
)


@dataclass(frozen=True)
class File:
    """A file that ships: of a shipped `recipe`, or of a case here; `shows` is what it is there for."""

    name: str
    shows: str
    recipe: str | None = None


FILES: tuple[File, ...] = (
    File("demo", "the demo: static int8, vocabulary and heads and neurons cut", "banking77-edge"),
    File("edge-full", "the same on all rows, three layers", "banking77-edge-full"),
    File("tiny", "smaller, with tables in 4 bits", "banking77-tiny"),
    File("static", "static int8, the whole vocabulary"),
    File("qdq", "static int8 in standard QuantizeLinear and DequantizeLinear"),
    File("dynamic", "int8 with the ranges of each batch (DynamicQuantizeMatMul)"),
    File("int4", "4-bit weights, fp32 inputs (MatMulNBits)"),
    File("int4-rounded", "4-bit weights, inputs rounded by the runtime (accuracy_level 4)"),
    File("adapters", "int8 with adapters inside"),
    File("prefix", "int8 with a trained prefix inside"),
    File("tokens", "a token classifier, int8"),
    File("pairs", "a classifier of pairs of texts, int8"),
)


def chosen(names: list[str] | None) -> tuple[File, ...]:
    """The files of these names; all where there are none.

    Raises:
        UserError: there is no file of that name.
    """
    known = {file.name: file for file in FILES}
    for name in names or ():
        if name not in known:
            raise UserError(f"--file {name}: no such file; known: {', '.join(known)}{nearest(name, known)}")
    return tuple(known[name] for name in names) if names else FILES


def run_folder(file: File, given: Mapping[str, Path], console: Console) -> Path:
    """The finished run that a file comes from: the one that was `given` by name, else its own, run once.

    Raises:
        UserError: the folder that was given holds no exported run.
    """
    if file.name in given:
        folder = given[file.name]
        if not (folder / "onnx" / "model.onnx").is_file() or not (folder / "recipe.yaml").is_file():
            raise UserError(f"--run {file.name}={folder}: no finished run (it has no recipe.yaml or onnx/model.onnx)")
        return folder
    if file.recipe is None:
        return prepared(SUITE, next(case for case in CASES if case.name == file.name), CASES, console)
    # Shared with `python -m benchmarks edge`.
    report(file.recipe, again=False)
    recipe = load_recipe(file.recipe)
    return Path("runs") / "benchmarks" / f"{file.recipe}-{recipe.hash[7:19]}"
