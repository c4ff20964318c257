"""What each method is trained with, on which task, and which learning rate validation chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case
from compressft.errors import UserError

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
