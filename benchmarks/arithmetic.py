"""What the grid of the int8 weights costs: accuracy over seeds and milliseconds, beside the grids that were not taken.

Every student starts from its task's dense model and is quantised while it is distilled; nothing else is removed, so
that runs differ by the grid alone. Times are those of one trained model written with every grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.arithmetic_speed import speed
from benchmarks.cases import Case, prepared, results, run_cases, update
from benchmarks.options import positive
from compressft.checkpoint import load_compressed
from compressft.modules.int8 import quantise_weight, weight_scale
from compressft.modules.quantizer import Int8Quantizer

RESULTS = Path(__file__).parent / "results" / "arithmetic.json"
SUITE = "arithmetic"
GRIDS: dict[str, dict[str, Any]] = {
    "8 bits": {"target": "vnni"},
    "portable": {"target": "any"},
    "7 bits": {"weight_bits": 7},
}
DATA = {
    "banking77": {
        "train": "{data}/banking77/train.jsonl",
        "test": "{data}/banking77/test.jsonl",
        "max_length": 64,
        "per_class": 50,
    },
    "sst2": {
        "train": "{data}/sst2/train_sentences.jsonl",
        "validation": "{data}/sst2/validation.jsonl",
        "test": "{data}/sst2/test.jsonl",
        "max_length": 64,
    },
}
TEACHER = {"banking77": {"epochs": 4, "learning_rate": 2e-4}, "sst2": {"epochs": 2, "learning_rate": 1e-4}}
STUDENT = {"epochs": 1, "learning_rate": 5e-5}
SEEDS = 3


def cases(seeds: int = SEEDS) -> list[Case]:
    """A dense model a task, and a student for every grid and seed."""
    found = []
    for task, data in DATA.items():
        stage = {"name": "teacher", "train": TEACHER[task]}
        found.append(_case(f"{task}-teacher", "minilm", data, stage, {"grid": "fp32"}))
    for seed in range(seeds):
        for task, data in DATA.items():
            source = f"{{{task}-teacher}}/model"
            for grid, fields in GRIDS.items():
                stage = {
                    "name": "student",
                    "passes": [{"type": "int8", **fields}],
                    "objectives": [{"type": "distill", "teacher": source, "task": 0.3, "logits": 0.7}],
                    "train": {**STUDENT, "seed": seed},
                }
                facts = {"grid": grid, "seed": seed}
                found.append(_case(f"{task}-{grid.replace(' ', '-')}-{seed}", source, data, stage, facts))
    return found


def _case(name: str, model: str, data: dict[str, Any], stage: dict[str, Any], facts: dict[str, Any]) -> Case:
    task = name.split("-")[0]
    recipe = {"name": name, "model": model, "data": data, "stages": [stage], "export": {"enabled": False}}
    after = () if model == "minilm" else (f"{task}-teacher",)
    return Case(name, task, recipe, after, keep=not after or facts.get("seed") == 0, facts={"task": task, **facts})


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks arithmetic`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks arithmetic", description=__doc__)
    parser.add_argument("parts", nargs="*", help="banking77, sst2, speed (default: everything)")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="how many students of each grid")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - {*DATA, "speed"})
    if unknown:
        parser.error(f"{unknown[0]!r} is no part; parts: {', '.join((*DATA, 'speed'))}")
    everything, console = cases(options.seeds), Console(stderr=True)
    wanted = [c for c in everything if not options.parts or c.group in options.parts]
    run_cases(SUITE, everything, wanted, RESULTS, console)
    if not options.parts or "speed" in options.parts:
        trained = prepared(SUITE, next(c for c in everything if c.name == "banking77-portable-0"), everything, console)
        dense = prepared(SUITE, next(c for c in everything if c.name == "banking77-teacher"), everything, console)
        rows, steps = speed(trained / "model"), coarseness(dense / "model")
        update(RESULTS, lambda document: document.update(speed=rows, coarseness=steps))
    text = render(results(RESULTS))
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def coarseness(folder: Path) -> dict[str, dict[str, float]]:
    """By grid: the rows' mean step over that of 8 bits, and the mean relative error of a matrix that is rounded."""
    weights = [
        layer.weight.detach()
        for name, layer in load_compressed(folder).named_modules()
        if isinstance(layer, nn.Linear) and "classifier" not in name
    ]
    found = {}
    for grid, fields in GRIDS.items():
        quantizer = Int8Quantizer(**fields)
        scales = [quantizer.weight_scale(weight) for weight in weights]
        ratios = torch.cat([scale / weight_scale(weight) for scale, weight in zip(scales, weights, strict=True)])
        errors = [
            float((quantise_weight(weight, scale) * scale[:, None] - weight).norm() / weight.norm())
            for scale, weight in zip(scales, weights, strict=True)
        ]
        found[grid] = {"step": float(ratios.mean()), "error": mean(errors)}
    return found


def render(document: dict[str, Any]) -> str:
    """The results as Markdown; what has not run is a dash."""
    found, hardware = document["cases"], document.get("hardware", {})
    lines = [
        "# The grid of the int8 weights",
        "",
        "`python -m benchmarks arithmetic`; MiniLM-L6, int8 beside distillation, accuracy on the test split in "
        "percent: mean of the seeds, in brackets each, and over seeds the standard error of the difference to 8 bits. "
        "The rows are the same for all: what a test split of another draw would give is not in that error.",
        "",
        f"| task | dense | {' | '.join(GRIDS)} |",
        "| --- | ---: |" + " ---: |" * len(GRIDS),
    ]
    for task in DATA:
        dense = found.get(f"{task}-teacher")
        scores = {grid: _scores(found, task, grid) for grid in GRIDS}
        cells = [_cell(scores[grid], scores["8 bits"] if grid != "8 bits" else None) for grid in GRIDS]
        base = f"{100 * dense['quality']['torch']:.2f}" if dense else "-"
        lines.append(f"| {task} | {base} | {' | '.join(cells)} |")
    if document.get("coarseness"):
        grids = document["coarseness"]
        steps = " | ".join(f"{one['step']:.2f}" for one in grids.values())
        errors = " | ".join(f"{one['error']:.2%}" for one in grids.values())
        lines += [
            "",
            "How coarse the grids are on the dense model's weights: a row's step, and the relative error of rounding a "
            "matrix once, without training:",
            "",
            f"| | {' | '.join(grids)} |",
            "| --- |" + " ---: |" * len(grids),
            f"| step, times that of 8 bits | {steps} |",
            f"| relative error | {errors} |",
        ]
    if document.get("speed"):
        rows = document["speed"]
        lines += [
            "",
            "The same trained model with each kind of weights, milliseconds (p50) in onnxruntime and the ratio to 8 "
            "bits, interleaved in one run; `exact` is whether this machine's default session gives the exact sums:",
            "",
            "| weights | exact | " + " | ".join(rows[0]["ms"]) + " |",
            "| --- | --- |" + " ---: |" * len(rows[0]["ms"]),
        ]
        first = rows[0]["ms"]
        for row in rows:
            times = " | ".join(f"{ms:.2f} ({ms / first[shape]:.2f})" for shape, ms in row["ms"].items())
            lines.append(f"| {row['weights']} | {'yes' if row['exact'] else 'no'} | {times} |")
    facts = [f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('cores', '?')} cores"]
    facts += [f"{name} {value}" for name, value in document.get("versions", {}).items()]
    return "\n".join([*lines, "", ", ".join(facts)]) + "\n"


def _scores(found: dict[str, Any], task: str, grid: str) -> dict[int, float]:
    wanted = [c for c in found.values() if (c["task"], c["grid"]) == (task, grid)]
    return {c["seed"]: 100 * c["quality"]["torch"] for c in wanted}


def _cell(scores: dict[int, float], base: dict[int, float] | None) -> str:
    if not scores:
        return "-"
    each = ", ".join(f"{scores[seed]:.2f}" for seed in sorted(scores))
    text = f"{mean(scores.values()):.2f} ({each})"
    if base is None:
        return text
    differences = [scores[seed] - base[seed] for seed in scores if seed in base]
    if len(differences) < 2:
        return text
    return f"{text}: {mean(differences):+.2f} ± {stdev(differences) / len(differences) ** 0.5:.2f}"
