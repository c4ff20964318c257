"""methods.json as Markdown: scores, costs, and which of the papers' claims hold here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, stdev, variance
from typing import Any

from benchmarks.race import ratio

Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]

ADAPTERS = ("adapter-houlsby", "adapter-pfeiffer", "adapter-parallel")
MASKS = ("mask", "supermask")
# What is claimed: points of the score below full fine-tuning, share of parameters, bits for each masked weight, and
# share of full fine-tuning's score.
ADAPTER_POINTS, ADAPTER_SHARE = 1.0, 0.05
MASK_POINTS, MASK_BITS = 2.0, 1.05
PREFIX_SHARE = 0.95


def render(
    document: Mapping[str, Any],
    finished: Runs,
    tasks: Sequence[str],
    methods: Sequence[str],
    masked: Mapping[str, int],
    variants: Mapping[str, Sequence[str]],
) -> str:
    """All tables.

    Args:
        finished: (task, method or variant) -> its runs at the chosen learning rate, one for each seed.
        masked: how many weights of a classifier each kind of mask decides on.
        variants: adapters with another width, by the task that they are trained on.
    """
    sections = [
        "# Methods",
        "`python -m benchmarks methods`; MiniLM-L6, six epochs (banking77: twelve, wnut17: four) in batches of 16. "
        "sst2 and banking77: about 2,000 training rows, three seeds (mean ± standard deviation); rte (GLUE's 277 "
        "validation rows as its test: a standard error of 3 points) and wnut17 (span F1): all rows, one seed. The "
        "learning rate is the best on validation rows among those tried with seed 0; where that was the least or the "
        "greatest, up to two further ones were tried. bf16 autocast, as everywhere where a CPU multiplies bf16. A "
        "dash has not run yet. `lsh_attention` is not here: it changes what attention is, so a pretrained model has "
        "to learn again to attend.",
        "## Test score",
        _table(["method", *tasks], [[m, *(_several(finished.get((t, m))) for t in tasks)] for m in methods]),
        "## What papers claim",
        "Points are differences from full fine-tuning, ± their standard error over the seeds.",
        "\n".join(f"- {line}" for line in claims(finished, tasks, masked)),
        *_widths(finished, variants),
        "## What it costs",
        _costs(document, finished, tasks[0], methods),
        "## Learning rates",
        _rates(document, tasks, methods),
    ]
    hardware, versions = document.get("hardware", {}), document.get("versions", {})
    facts = [f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('cores', '?')} cores"]
    facts += [f"{name} {value}" for name, value in versions.items()]
    return "\n\n".join([*sections, ", ".join(facts)]) + "\n"


def scores(runs: Sequence[Mapping[str, Any]] | None) -> list[float]:
    """Test scores, one for each seed."""
    return [run["quality"]["torch"] for run in runs or ()]


def claims(finished: Runs, tasks: Sequence[str], masked: Mapping[str, int]) -> list[str]:
    """A line for each claim: met, not met or not measured, and the figures (with standard errors) that say so.

    Tasks with several seeds decide; a single run says too little.
    """
    judged = [task for task in tasks if len(finished.get((task, "full"), ())) > 1]
    return [_adapters(finished, judged), _masks(finished, judged, masked), _prefix(finished)]


def _verdict(claim: str, holds: Sequence[tuple[bool, str]], every: bool = True) -> str:
    if not holds:
        return f"{claim}: not measured yet."
    met = (all if every else any)(good for good, _ in holds)
    return f"{claim}: **{'met' if met else 'not met'}**: " + "; ".join(figure for _, figure in holds) + "."


def _points(finished: Runs, task: str, method: str) -> tuple[float, float] | None:
    """Points of the score above full fine-tuning's, and the standard error of that over the seeds."""
    own, full = scores(finished.get((task, method))), scores(finished.get((task, "full")))
    if not own or not full:
        return None
    error = sqrt(sum(variance(found) / len(found) for found in (own, full)))
    return 100 * (mean(own) - mean(full)), 100 * error


def _below(finished: Runs, tasks: Sequence[str], method: str, limit: float) -> tuple[bool, list[str]] | None:
    """Whether a method is nowhere more than `limit` points below full fine-tuning, and by how much on each task."""
    found = {task: _points(finished, task, method) for task in tasks}
    measured = {task: points for task, points in found.items() if points is not None}
    if not measured:
        return None
    told = [f"{task} {points:+.1f} ± {error:.1f}" for task, (points, error) in measured.items()]
    return min(points for points, _ in measured.values()) >= -limit, told


def _adapters(finished: Runs, tasks: Sequence[str]) -> str:
    holds = []
    for method in ADAPTERS:
        found = _below(finished, tasks, method, ADAPTER_POINTS)
        if found is not None:
            shares = [_share(run) for task in tasks for run in finished.get((task, method), ())]
            good = found[0] and max(shares) < ADAPTER_SHARE
            holds.append((good, f"{method} {', '.join(found[1])} points with {100 * max(shares):.1f} %"))
    claim = (
        f"Adapters come within {ADAPTER_POINTS:g} point of full fine-tuning with less than {100 * ADAPTER_SHARE:g} %"
    )
    return _verdict(f"{claim} of the parameters (Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022)", holds)


def _masks(finished: Runs, tasks: Sequence[str], masked: Mapping[str, int]) -> str:
    holds = []
    for method in MASKS:
        found = _below(finished, tasks, method, MASK_POINTS)
        if found is not None:
            runs = [run for task in tasks for run in finished.get((task, method), ())]
            bits = max(_bits(run, masked[method]) for run in runs)
            good = found[0] and bits <= MASK_BITS
            holds.append(
                (good, f"{method} {', '.join(found[1])} points with {bits:.2f} bits a weight next to the head")
            )
    claim = f"Masks come within {MASK_POINTS:g} points of full fine-tuning at one bit a weight"
    return _verdict(f"{claim} (Zhao et al. 2020; Radiya-Dixit & Wang 2020)", holds, every=False)


def _bits(run: Mapping[str, Any], masked: int) -> float:
    """Bits in delta/ for each masked weight; what else is trained, the head, is stored in fp32."""
    return 8 * (run["size_bytes"]["delta"] - 4 * (run["parameters"]["trainable"] - masked)) / masked


def _prefix(finished: Runs) -> str:
    own, full = scores(finished.get(("sst2", "prefix"))), scores(finished.get(("sst2", "full")))
    holds = []
    if own and full:
        share = mean(own) / mean(full)
        holds.append((share > PREFIX_SHARE, f"{100 * share:.1f} %"))
    return _verdict(
        f"A prefix reaches more than {100 * PREFIX_SHARE:g} % of full fine-tuning's accuracy on sst2 (Li & Liang 2021)",
        holds,
    )


def _widths(finished: Runs, variants: Mapping[str, Sequence[str]]) -> list[str]:
    """What width and place of an adapter do, where that has run."""
    sections = []
    for task, names in variants.items():
        ran = [name for name in (*ADAPTERS, *names) if (task, name) in finished]
        if not set(names) & set(ran):
            continue
        by_size = sorted(ran, key=lambda name: finished[task, name][0]["parameters"]["trainable"])
        rows = [
            [name, f"{100 * _share(finished[task, name][0]):.2f} %", _several(finished[task, name])] for name in by_size
        ]
        sections += [
            f"## Width and place of an adapter ({task})",
            _table(["method", "share of the parameters", "test score"], rows)
            + "\n\nA number at the end is the width; the others have their papers' default. A variant has the "
            "learning rate that was chosen for its placement.",
        ]
    return sections


def _share(run: Mapping[str, Any]) -> float:
    return run["parameters"]["trainable"] / run["parameters"]["base"]


def _costs(document: Mapping[str, Any], finished: Runs, task: str, methods: Sequence[str]) -> str:
    rows = []
    measured = document.get("speed", {})
    full = finished.get((task, "full"))
    for method in methods:
        runs = finished.get((task, method))
        row = [method, *(["-"] * 3)]
        if runs:
            trained, delta = runs[0]["parameters"]["trainable"], mean(run["size_bytes"]["delta"] for run in runs)
            row = [method, f"{trained:,}", f"{100 * _share(runs[0]):.2f} %", _megabytes(delta)]
            if full:
                saved = round(100 * (1 - delta / mean(run["size_bytes"]["delta"] for run in full)), 1)
                # Adding zero takes the sign off a negative one.
                row[-1] += f", {saved + 0.0:.1f} % less"
        found = measured.get(method)
        row += ["-"] * 3 if not found else _beside(found)
        rows.append(row)
    header = ["method", "trained", "share", f"delta/ ({task})", "step", "memory", "saved activations"]
    return _table(header, rows) + (
        "\n\nStep: 32 rows of 64 tokens in fp32, in turns with full fine-tuning, and how many times as long as that "
        "takes. Memory: the process's peak, less what its libraries take. Saved activations: what "
        "autograd keeps of one forward pass, parameters left out. A probe's features are in its cache."
    )


def _beside(found: Mapping[str, Any]) -> list[str]:
    if "error" in found:
        return [found["error"], "-", "-"]
    full = found["full"]
    return [
        f"{found['step_ms']:.0f} ms, {ratio(found, full):.2f}x",
        f"{_megabytes(found['peak_bytes'])}, {found['peak_bytes'] / full['peak_bytes']:.2f}x",
        f"{_megabytes(found['saved_bytes'])}, {found['saved_bytes'] / full['saved_bytes']:.2f}x",
    ]


def _rates(document: Mapping[str, Any], tasks: Sequence[str], methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        row = [method]
        for task in tasks:
            found = document.get("chosen", {}).get(f"{task}-{method}")
            if found is None:
                row.append("-")
            else:
                rate = "none" if found["learning_rate"] is None else f"{found['learning_rate']:g}"
                tried = [f"{one}: {_validation(score)}" for one, score in found["validation"].items()]
                own, failed = found["chosen_on"] == task, found.get("learned_nothing", ())
                origin = f", for {failed[0]:g}," if failed else ","
                row.append(f"{rate} ({', '.join(tried)})" if own else f"{rate}{origin} {found['chosen_on']}'s")
        rows.append(row)
    return _table(["method", *tasks], rows) + (
        "\n\nIn brackets, validation scores of those that were tried. Where another task's rate scores 0 on "
        "validation, up to two lower ones are tried in its place."
    )


def _validation(score: float) -> str:
    return "diverged" if score < 0 else f"{100 * score:.1f}"


def _megabytes(number: float) -> str:
    return f"{number / 1e6:.2f} MB" if number < 1e7 else f"{number / 1e6:.0f} MB"


def _several(runs: Sequence[Mapping[str, Any]] | None) -> str:
    found = scores(runs)
    if not found:
        return "-"
    deviation = f" ± {100 * stdev(found):.2f}" if len(found) > 1 else ""
    return f"{100 * mean(found):.2f}{deviation} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
