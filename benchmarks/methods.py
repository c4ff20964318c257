"""What each method reaches, trains, stores and costs compared with full fine-tuning, on real data.

Learning rates are chosen on the validation split, with seed 0, before a test score counts; then come the other seeds.
A grid grows as long as its first or last rate is the best, by up to two rates.
MiniLM-L6; sst2 and banking77 with about 2,000 training rows and three seeds, rte and wnut17 with one, at the rate
that was chosen on sst2 or banking77, or a lower one where nothing is learned with that. 240 runs or more, of two to
five minutes on one thread of an AMD EPYC 9R14; two processes with different tasks share the work. Every run is kept:
an interrupted night goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, data_folder, prepared, results, run_cases, update
from benchmarks.methods_choice import (
    FUSED,
    FUSED_TASKS,
    SETTINGS,
    TASKS,
    VARIANTS,
    VARIED,
    chosen,
    descent,
    first_case,
    grid,
    record,
    seeded,
    validation,
    varied,
)
from benchmarks.methods_table import MASKS, render
from benchmarks.options import positive
from benchmarks.race import Conditions, Contestant, race
from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.model.load import load_empty
from compressft.model.source import resolve
from compressft.recipe.program import parse_member
from compressft.transform import Context
from compressft.utils.machine import usable_cores

RESULTS = Path(__file__).parent / "results" / "methods.json"
SUITE = "methods"


def study(task: str, method: str, only_choose: bool, path: Path, console: Console) -> None:
    """Run what is missing of one method on one task, and what that stands on; write the choice down."""
    stands_on: list[Case] = []
    if method == "fusion":
        for source in FUSED_TASKS:
            _choose(source, FUSED, path, console)
            stands_on.append(first_case(results(path), source, FUSED))
    _choose(task, method, path, console, stands_on)
    if only_choose or chosen(results(path), task, method) is None:
        return
    # A run may change the choice.
    while missing := [one for one in seeded(results(path), task, method) if record(results(path), one) is None]:
        _attempt(missing[0], stands_on, path, console)
    _write_choice(task, method, path)


def _attempt(one: Case, stands_on: Sequence[Case], path: Path, console: Console) -> Mapping[str, Any]:
    """Run it where that is missing. A rate may be too high: that is a result too."""
    try:
        run_cases(SUITE, [*stands_on, one], [one], path, console)
    except UserError as error:
        failed = {"key": one.key, "group": one.group, **one.facts, "error": str(error)}
        update(path, lambda document: document["cases"].update({one.name: failed}))
        console.print(f"{one.name}: {error}", highlight=False, markup=False)
    run = record(results(path), one)
    assert run is not None
    return run


def _choose(task: str, method: str, path: Path, console: Console, stands_on: Sequence[Case] = ()) -> None:
    while missing := [one for one in grid(results(path), task, method) if record(results(path), one) is None]:
        _attempt(missing[0], stands_on, path, console)
    _write_choice(task, method, path)


def _write_choice(task: str, method: str, path: Path) -> None:
    document = results(path)
    scores = {f"{one.facts['rate']:g}": validation(record(document, one)) for one in grid(document, task, method)}
    *failed, rate = descent(document, task, method) or [None]
    found = {"learning_rate": rate, "chosen_on": TASKS[task].rates_of or task, "validation": scores}
    found |= {"learned_nothing": failed} if failed else {}
    update(path, lambda document: document.setdefault("chosen", {}).update({f"{task}-{method}": found}))


# Processes that are alive at a time, next to full fine-tuning's.
TOGETHER = 4


def speed(methods: Sequence[str], path: Path, console: Console, conditions: Conditions) -> None:
    """Step time, peak memory and saved activations of each method in turns with full fine-tuning."""
    contestants = {}
    for method in methods:
        fields = dict(SETTINGS[method].method)
        if method == "fusion":
            sources = [first_case(results(path), task, FUSED) for task in FUSED_TASKS]
            fields["adapters"] = [str(prepared(SUITE, one, sources, console).resolve() / "delta") for one in sources]
        contestants[method] = Contestant("compressft", fields, keep_memory=True)
    full = Contestant("compressft", SETTINGS["full"].method, keep_memory=True)
    names = [method for method in methods if method != "full"]
    for start in range(0, len(names), TOGETHER):
        heat = names[start : start + TOGETHER]
        found = race({"full": full, **{name: contestants[name] for name in heat}}, conditions, console)
        beside = found["full"]
        measured = {name: {**found[name], "full": beside} for name in heat} | {"full": {**beside, "full": beside}}
        update(path, lambda document: document.setdefault("speed", {}).update(measured))  # noqa: B023


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks methods`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks methods", description=__doc__)
    parser.add_argument("names", nargs="*", help="tasks, methods or TASK-METHOD (default: everything)")
    parser.add_argument("--choose", action="store_true", help="stop after the learning rates are chosen")
    parser.add_argument("--speed", action="store_true", help="measure the methods' step time and memory, nothing else")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where speed is measured")
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of speed")
    parser.add_argument("--steps", type=positive, default=10, help="steps in each of them")
    parser.add_argument(
        "--threads", type=positive, default=usable_cores(), help="of speed; runs take torch's own number"
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    options = parser.parse_args(arguments)
    console, asked = Console(stderr=True), set(options.names)
    both = {f"{task}-{method}" for task in TASKS for method in SETTINGS}
    unknown = sorted(asked - set(TASKS) - set(SETTINGS) - both - set(VARIANTS))
    if unknown:
        known = f"tasks: {', '.join(TASKS)}; methods: {', '.join([*SETTINGS, *VARIANTS])}"
        parser.error(f"{unknown[0]!r} is no task, method or TASK-METHOD; {known}")
    data_folder()
    if not options.speed:
        for task in TASKS:
            for method in SETTINGS:
                if not asked or asked & {task, method, f"{task}-{method}"}:
                    study(task, method, options.choose, options.json, console)
                    write(options.json)
        for name, (_, method) in VARIANTS.items():
            if name in asked or not (asked or options.choose):
                _choose(VARIED, method, options.json, console)
                for one in varied(results(options.json), name):
                    _attempt(one, (), options.json, console)
                write(options.json)
    if options.speed or not (asked or options.choose):
        methods = [method for method in SETTINGS if method in asked] or list(SETTINGS)
        rounds, steps, threads = options.rounds, options.steps, options.threads
        conditions = Conditions(resolve("minilm"), options.device, "fp32", rounds, steps, threads)
        speed(methods, options.json, console, conditions)
    write(options.json)
    return 0


def write(path: Path) -> None:
    """The tables next to the figures."""
    document = results(path)
    wanted = {
        (task, method): seeded(document, task, method)
        for task in TASKS
        for method in SETTINGS
        if chosen(document, task, method) is not None
    }
    wanted |= {(VARIED, name): varied(document, name) for name in VARIANTS}
    finished = {}
    for key, cases in wanted.items():
        runs = [record(document, one) for one in cases]
        if runs and all(run is not None and "error" not in run for run in runs):
            finished[key] = runs
    masked = {method: masked_weights(method) for method in {name for _, name in finished} & set(MASKS)}
    table = render(document, finished, tuple(TASKS), tuple(SETTINGS), masked, {VARIED: tuple(VARIANTS)})
    path.with_suffix(".md").write_text(table, encoding="utf-8")


@cache
def masked_weights(method: str) -> int:
    """How many weights of MiniLM a kind of mask decides on."""
    model = load_empty("minilm", "AutoModelForSequenceClassification", num_labels=2)
    transform = parse_member(SETTINGS[method].method, METHODS, "method")
    transform.prepare(model, Context((transform,)))
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(".scores"))
