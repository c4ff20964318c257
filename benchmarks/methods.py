"""What each method reaches, trains, stores and costs beside full fine-tuning, on real data.

Learning rates are chosen on the validation split, with seed 0, before a test score counts; then come the other seeds.
A grid grows as long as its first or last rate is the best, by up to two rates.
MiniLM-L6; sst2 and banking77 with about 2,000 training rows and three seeds, rte and wnut17 with one, at the rate that
was chosen on sst2 or banking77. 240 runs or more, of two to five minutes on one thread of an AMD EPYC 9R14; two
processes with different tasks share the work. Every run is kept: an interrupted night goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, data_folder, prepared, results, run_cases, update
from benchmarks.methods_table import MASKS, render
from benchmarks.options import positive
from benchmarks.race import Conditions, Contestant, race
from compressft.errors import UserError
from compressft.measure import usable_cores
from compressft.methods import METHODS
from compressft.model import load_empty, resolve
from compressft.recipe import parse_transform
from compressft.transform import Context

RESULTS = Path(__file__).parent / "results" / "methods.json"
SUITE = "methods"
BATCH = 16
SEEDS = 3


@dataclass(frozen=True)
class Setting:
    """A method as a recipe writes it, and the learning rates to choose from at first, neighbours on one of `LADDERS`.

    `head_rate`: the stage's rate where the chosen one is the method's own `learning_rate`.
    """

    method: Mapping[str, Any]
    rates: Sequence[float]
    head_rate: float | None = None


# Mantissas of the rates that are tried.
LADDERS = ((1, 3), (1, 2, 5))
# By how many rates a grid may grow.
FURTHER = 2
TUNED = (1e-4, 2e-4, 5e-4)
ADDED = (3e-4, 1e-3, 3e-3)
SCALED = (1e-3, 3e-3, 1e-2)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
# Name -> what is trained; "full" is what the others are compared with.
SETTINGS: dict[str, Setting] = {
    "full": Setting({"type": "full"}, TUNED),
    "layers": Setting({"type": "layers", "top": 2}, (2e-4, 5e-4, 1e-3)),
    "probe-linear": Setting({"type": "probe", "standardise": True, "pooling": "mean"}, SCALED),
    "probe-mlp": Setting({"type": "probe", "head": "mlp", "standardise": True, "pooling": "mean"}, ADDED),
    "scalar-mix": Setting({"type": "scalar_mix"}, SCALED),
    "adapter-houlsby": Setting({"type": "adapter", "placement": "houlsby"}, ADDED),
    "adapter-pfeiffer": Setting({"type": "adapter", "placement": "pfeiffer"}, ADDED),
    "adapter-parallel": Setting({"type": "adapter", "placement": "parallel"}, ADDED),
    # The adapters' folders follow.
    "fusion": Setting({"type": "fusion"}, (1e-4, 3e-4, 1e-3)),
    "side-copy": Setting({"type": "side"}, TUNED),
    "side-ladder": Setting({"type": "side", "network": "ladder"}, ADDED),
    "prefix": Setting({"type": "prefix", "length": 10}, SCALED),
    "lora": Setting({"type": "peft", "config": {"peft_type": "LORA", **LORA}}, ADDED),
    "dora": Setting({"type": "peft", "config": {"peft_type": "LORA", "use_dora": True, **LORA}}, ADDED),
    "ia3": Setting({"type": "peft", "config": {"peft_type": "IA3"}}, (3e-3, 1e-2, 3e-2)),
    "mask": Setting({"type": "mask", "preset": "masking"}, (3e-3, 1e-2, 3e-2), head_rate=1e-3),
    "supermask": Setting({"type": "mask", "preset": "supermask"}, SCALED, head_rate=1e-3),
    "diff": Setting({"type": "diff"}, (2e-4, 5e-4, 1e-3)),
    "task-vector": Setting({"type": "task_vector", "encoding": "magnitude", "density": 0.05}, TUNED),
    "head-gates": Setting({"type": "head_gates", "decide": "importance", "heads": 0.33}, TUNED),
}
# What tells where an adapter's score comes from: name -> its fields, and the method whose learning rate it has (sst2).
VARIANTS: dict[str, tuple[Mapping[str, Any], str]] = {
    "adapter-pfeiffer-96": ({"type": "adapter", "placement": "pfeiffer", "size": 96}, "adapter-pfeiffer"),
    "adapter-houlsby-24": ({"type": "adapter", "placement": "houlsby", "size": 24}, "adapter-houlsby"),
}
VARIED = "sst2"
# What a fusion listens to: the adapters of these tasks.
FUSED, FUSED_TASKS = "adapter-pfeiffer", ("sst2", "banking77", "rte")


@dataclass(frozen=True)
class Task:
    """Rows, and where the learning rates come from: a grid of its own, or another task's choice."""

    data: Mapping[str, Any]
    epochs: int = 6
    kind: str = "sequence-classification"
    rates_of: str | None = None


def _files(folder: str, **files: str) -> dict[str, str]:
    return {split: f"{{data}}/{folder}/{name}.jsonl" for split, name in files.items()}


TASKS: dict[str, Task] = {
    # `limit` would cut validation and test too.
    "sst2": Task(
        {**_files("sst2", train="train_sentences", validation="validation", test="test"), "per_class": 1000}
        | {"max_length": 64}
    ),
    # Six epochs are too few for 26 rows of each of 77 classes, for full fine-tuning most of all.
    "banking77": Task(
        {**_files("banking77", train="train", test="test"), "per_class": 26, "max_length": 64}, epochs=12
    ),
    # GLUE's validation rows are the test; a validation split is carved out of train.
    "rte": Task(
        {**_files("rte", train="train", test="validation"), "columns": {"text": "text_a"}, "max_length": 128},
        rates_of="sst2",
    ),
    # As many steps as sst2's, roughly: 3,394 rows.
    "wnut17": Task(
        {**_files("wnut17", train="train", validation="validation", test="test"), "max_length": 64},
        epochs=4,
        kind="token-classification",
        rates_of="banking77",
    ),
}

Document = Mapping[str, Any]


def case(document: Document, task: str, method: str, rate: float, seed: int) -> Case:
    """One run. A fusion stands on runs of adapters at the rates that `document` says were chosen."""
    setting = Setting(VARIANTS[method][0], ()) if method in VARIANTS else SETTINGS[method]
    asked = TASKS[task]
    fields, after = dict(setting.method), ()
    if method == "fusion":
        sources = [first_case(document, source, FUSED) for source in FUSED_TASKS]
        after = tuple(source.name for source in sources)
        fields["adapters"] = [f"{{{name}}}/delta" for name in after]
    if setting.head_rate is not None:
        fields["learning_rate"] = rate
    if asked.kind == "token-classification":
        # Each token is read by itself.
        fields.pop("pooling", None)
    train = {
        "epochs": asked.epochs,
        "batch_size": BATCH,
        "learning_rate": setting.head_rate or rate,
        "seed": seed,
        "save": "no",
    }
    recipe = {
        "name": f"{task}-{method}",
        "model": "minilm",
        "task": asked.kind,
        "data": dict(asked.data),
        "stages": [{"name": "task", "method": fields, "train": train}],
        "export": {"enabled": False},
    }
    group = "choose" if seed == 0 and asked.rates_of is None else "seeds"
    name = f"{task}-{method}-{rate:g}" + (f"-seed{seed}" if seed else "")
    return Case(name, group, recipe, after, facts={"task": task, "method": method, "rate": rate, "seed": seed})


def ladder_of(rates: Sequence[float]) -> list[float]:
    """All rates of the ladder that these stand on, in order."""
    for mantissas in LADDERS:
        ladder = [float(f"{mantissa}e{exponent}") for exponent in range(-9, 2) for mantissa in mantissas]
        if set(rates) <= set(ladder):
            return ladder
    raise ValueError(f"{tuple(rates)} are on no ladder")


def neighbours(rates: Sequence[float]) -> tuple[float, float]:
    """The rates below and above, on the ladder that these stand on."""
    ladder = ladder_of(rates)
    return ladder[ladder.index(min(rates)) - 1], ladder[ladder.index(max(rates)) + 1]


def grid(document: Document, task: str, method: str) -> list[Case]:
    """The runs from which a learning rate is chosen, by rate; more as soon as the best known one is at an end."""
    source = TASKS[task].rates_of or task
    cases = [case(document, source, method, rate, 0) for rate in SETTINGS[method].rates]
    for _ in range(FURTHER):
        runs = [record(document, one) for one in cases]
        scores = [validation(run) for run in runs if run is not None]
        if len(scores) < len(runs) or max(scores) < 0:
            break
        best = scores.index(max(scores))
        below, above = neighbours([one.facts["rate"] for one in cases])
        if best == 0:
            cases.insert(0, case(document, source, method, below, 0))
        elif best == len(cases) - 1:
            cases.append(case(document, source, method, above, 0))
    return cases


def record(document: Document, one: Case) -> Mapping[str, Any] | None:
    """What was written about a run; None where it has not run, or was asked otherwise then."""
    found = document["cases"].get(one.name)
    return found if found is not None and found["key"] == one.key else None


def validation(run: Mapping[str, Any]) -> float:
    """The score after the last epoch; below all others where the run diverged."""
    return -1.0 if "error" in run else run["validation"][-1][run["quality"]["metric"]]


def best(document: Document, task: str, method: str) -> float | None:
    """The rate with the best validation score in the grid; None while one of them has not run.

    Of equal ones the lowest.
    """
    if method == "fusion" and any(chosen(document, source, FUSED) is None for source in FUSED_TASKS):
        return None
    cases = grid(document, task, method)
    scores = [validation(run) for run in (record(document, one) for one in cases) if run is not None]
    if len(scores) < len(cases) or max(scores) < 0:
        return None
    return cases[scores.index(max(scores))].facts["rate"]


def descent(document: Document, task: str, method: str) -> list[float]:
    """The best rate and, where it is another task's, up to two lower ones while nothing is learned with it here.

    That is a validation score of 0, or a run that diverged. Empty while the grid has not run.
    """
    rate = best(document, task, method)
    rates = [] if rate is None else [rate]
    if TASKS[task].rates_of is None:
        return rates
    ladder = ladder_of(SETTINGS[method].rates)
    while rates and len(rates) <= FURTHER:
        run = record(document, case(document, task, method, rates[-1], 0))
        if run is None or validation(run) > 0:
            break
        rates.append(ladder[ladder.index(rates[-1]) - 1])
    return rates


def chosen(document: Document, task: str, method: str) -> float | None:
    """The rate whose runs count; None while the grid has not run."""
    return next(reversed(descent(document, task, method)), None)


def first_case(document: Document, task: str, method: str) -> Case:
    """The run with seed 0 at the chosen rate.

    Raises:
        UserError: nothing is chosen yet.
    """
    rate = chosen(document, task, method)
    if rate is None:
        raise UserError(f"{task}-{method}: its learning rate is not chosen yet; run {task}-{method} first")
    return case(document, task, method, rate, 0)


def seeded(document: Document, task: str, method: str) -> list[Case]:
    """The runs whose test scores count: one for each seed, at the chosen rate."""
    first = first_case(document, task, method)
    seeds = SEEDS if TASKS[task].rates_of is None else 1
    return [first, *(case(document, task, method, first.facts["rate"], seed) for seed in range(1, seeds))]


def varied(document: Document, name: str) -> list[Case]:
    """A variant's runs, one for each seed; none while its learning rate is not chosen."""
    rate = chosen(document, VARIED, VARIANTS[name][1])
    return [] if rate is None else [case(document, VARIED, name, rate, seed) for seed in range(SEEDS)]


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


# Processes that are alive at a time, beside full fine-tuning's.
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
    """The tables beside the figures."""
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
    transform = parse_transform(SETTINGS[method].method, METHODS, "method")
    transform.prepare(model, Context((transform,)))
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith(".scores"))
