"""What the grid of the int8 weights costs: accuracy over seeds and milliseconds, next to the grids that were not taken.

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
from compressft.model.saved.compressed import load_compressed
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


def cases(seeds: int = SEEDS, teachers: int = 1) -> list[Case]:
    """Dense models of every task, and of each a student for every grid and seed."""
    return [
        case
        for teacher in range(teachers)
        for task in DATA
        for case in (_teacher(task, teacher), *_students(task, teacher, seeds))
    ]


def _teacher(task: str, seed: int) -> Case:
    # The first draws as a recipe does that names no seed.
    train = TEACHER[task] | ({"seed": seed} if seed else {})
    recipe = _recipe(_teacher_name(task, seed), "minilm", task, {"name": "teacher", "train": train})
    return Case(recipe["name"], task, recipe, keep=True, facts={"task": task, "grid": "fp32", "teacher": seed})


def _teacher_name(task: str, seed: int) -> str:
    return f"{task}-teacher-{seed}" if seed else f"{task}-teacher"


def _students(task: str, teacher: int, seeds: int) -> list[Case]:
    source, found = _teacher_name(task, teacher), []
    for seed in range(seeds):
        for grid, fields in GRIDS.items():
            stage = {
                "name": "student",
                "passes": [{"type": "int8", **fields}],
                "objectives": [{"type": "distill", "teacher": f"{{{source}}}/model", "task": 0.3, "logits": 0.7}],
                "train": {**STUDENT, "seed": seed},
            }
            whose = f"-of-{teacher}" if teacher else ""
            recipe = _recipe(f"{task}-{grid.replace(' ', '-')}-{seed}{whose}", f"{{{source}}}/model", task, stage)
            facts = {"task": task, "grid": grid, "seed": seed, "teacher": teacher}
            found.append(Case(recipe["name"], task, recipe, (source,), keep=not seed and not teacher, facts=facts))
    return found


def _recipe(name: str, model: str, task: str, stage: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "model": model, "data": DATA[task], "stages": [stage], "export": {"enabled": False}}


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks arithmetic`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks arithmetic", description=__doc__)
    parser.add_argument("parts", nargs="*", help="banking77, sst2, speed (default: everything)")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help="how many students of each grid and dense model")
    parser.add_argument("--teachers", type=positive, default=1, help="how many dense models of each task")
    parser.add_argument("--grid", nargs="+", choices=tuple(GRIDS), default=tuple(GRIDS), help="these grids alone")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - {*DATA, "speed"})
    if unknown:
        parser.error(f"{unknown[0]!r} is no part; parts: {', '.join((*DATA, 'speed'))}")
    everything, console = cases(options.seeds, options.teachers), Console(stderr=True)
    wanted = [c for c in everything if not options.parts or c.group in options.parts]
    wanted = [c for c in wanted if c.facts["grid"] in ("fp32", *options.grid)]
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
        "`python -m benchmarks arithmetic`; MiniLM-L6, int8 next to distillation, accuracy on the test split in "
        "percent: mean, in brackets each seed (of one dense model after the other), and the difference to 8 bits with "
        "its standard error: over the dense models where there are several, else over seeds. "
        "The rows are the same for all: what a test split of another draw would give is not in that error.",
        "",
        f"| task | dense | {' | '.join(GRIDS)} |",
        "| --- | ---: |" + " ---: |" * len(GRIDS),
    ]
    for task in DATA:
        scores = {grid: _scores(found, task, grid) for grid in GRIDS}
        cells = [_cell(scores[grid], scores["8 bits"] if grid != "8 bits" else None) for grid in GRIDS]
        lines.append(f"| {task} | {_cell(_scores(found, task, 'fp32'), None)} | {' | '.join(cells)} |")
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


def _scores(found: dict[str, Any], task: str, grid: str) -> dict[int, dict[int, float]]:
    """Percent by the dense model's seed, then by the student's."""
    scores: dict[int, dict[int, float]] = {}
    for case in found.values():
        if (case["task"], case["grid"]) == (task, grid):
            scores.setdefault(case.get("teacher", 0), {})[case.get("seed", 0)] = 100 * case["quality"]["torch"]
    return scores


def _cell(scores: dict[int, dict[int, float]], base: dict[int, dict[int, float]] | None) -> str:
    if not scores:
        return "-"
    each = "; ".join(", ".join(f"{of[seed]:.2f}" for seed in sorted(of)) for _, of in sorted(scores.items()))
    text = f"{mean(score for of in scores.values() for score in of.values()):.2f} ({each})"
    if base is None:
        return text
    differences = [
        [of[seed] - base[teacher][seed] for seed in of if seed in base.get(teacher, {})]
        for teacher, of in scores.items()
    ]
    differences = [of for of in differences if of]
    # Students of one dense model err alike: with several of those, each is one draw.
    draws = [mean(of) for of in differences] if len(differences) > 1 else [d for of in differences for d in of]
    if len(draws) < 2:
        return text
    return f"{text}: {mean(draws):+.2f} ± {stdev(draws) / len(draws) ** 0.5:.2f}"
