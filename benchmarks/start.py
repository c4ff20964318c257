"""Seconds to the first training step and peak memory of every shipped recipe's smoke run, each a process of its own.

Run as a user would (`compressft run NAME --smoke`), so imports, data, model, search, export and report are all in it.
Recipes whose model or rows are not at hand (a hub out of reach, an extra that is not installed) are named with
the reason. `--source` measures another checkout with the same command: before and after a change.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from rich.console import Console

from benchmarks.options import positive
from compressft.recipe.document import shipped_recipes
from compressft.utils.machine import hardware, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Seconds between two looks at a run's log.
LOOK = 0.01


@dataclass(frozen=True)
class Start:
    """One smoke run.

    Attributes:
        first_step: seconds from the process's start to its first finished training step.
        seconds: of the whole run.
        cpu_seconds: user's and system's, of the run and its own processes; what neighbours change least.
        peak_bytes: largest resident size of the run, or of one of its own processes.
    """

    first_step: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measure(name: str, source: Path, scratch: Path) -> Start | str:
    """A smoke run of a recipe, or in a line why there is none."""
    output, log = scratch / name, scratch / f"{name}.log"
    command = [sys.executable, "-m", "compressft", "run", name, "--smoke", "--output", str(output)]
    began, first = time.perf_counter(), None
    with log.open("wb") as said:
        process = subprocess.Popen(command, cwd=scratch, env=environment(source), stdout=said, stderr=said)
        while True:
            number, status, used = os.wait4(process.pid, os.WNOHANG)
            if first is None and trained(output / "metrics.jsonl"):
                first = time.perf_counter() - began
            if number:
                break
            time.sleep(LOOK)
    seconds = time.perf_counter() - began
    # Already waited for.
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first is None:
        return reason(log.read_text(encoding="utf-8"))
    # macOS counts bytes, others kibibytes.
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Start(first, seconds, used.ru_utime + used.ru_stime, peak)


def environment(source: Path) -> dict[str, str]:
    """That of a checkout's own code."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(source / "kernels")])}


def trained(metrics: Path) -> bool:
    """Whether a step is in a run's log."""
    return metrics.is_file() and '"kind": "train"' in metrics.read_text(encoding="utf-8")


def reason(log: str) -> str:
    """The last line of a failed run, without this machine's folders."""
    lines = [line for line in log.splitlines() if line.strip()] or ["ended without a word"]
    return re.sub(r"(/[\w.+-]+)+/", ".../", lines[-1].removeprefix("error: "))[:300]


def quietest(runs: Sequence[Start]) -> Start:
    """Of each figure the least: neighbours only add."""
    return Start(*(min(values) for values in zip(*(asdict(run).values() for run in runs), strict=True)))


def table(document: Mapping[str, object]) -> str:
    """The results as Markdown."""
    found: dict[str, dict[str, float]] = document["recipes"]  # type: ignore[assignment]
    missing: dict[str, str] = document["not_run"]  # type: ignore[assignment]
    lines = [
        f"# Start and peak memory of the shipped recipes ({document['date']})",
        "",
        f"`{document['command']}`: `compressft run NAME --smoke`, quietest of {document['rounds']} rounds.",
        "",
        "| recipe | to the first step | whole run | CPU | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['first_step']:.1f} s | {row['seconds']:.1f} s | {row['cpu_seconds']:.1f} s "
            f"| {row['peak_bytes'] / 1e6:.0f} MB |"
        )
    if missing:
        lines += ["", "Not run on this machine:", ""]
        lines += [f"- {name}: {said}" for name, said in missing.items()]
    about: dict[str, object] = document["hardware"]  # type: ignore[assignment]
    used: dict[str, str] = document["versions"]  # type: ignore[assignment]
    lines += [
        "",
        f"{about['cpu']}, {about['cores']} cores; " + ", ".join(f"{key} {value}" for key, value in used.items()),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks start`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks start", description=__doc__)
    parser.add_argument("recipes", nargs="*", help="recipes to run (default: all shipped ones)")
    parser.add_argument("--rounds", type=positive, default=1)
    parser.add_argument("--source", type=Path, default=ROOT, help="the checkout to measure (default: this one)")
    parser.add_argument("--json", type=Path, default=RESULTS / "start.json")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    runs: dict[str, list[Start]] = {}
    missing: dict[str, str] = {}
    names = options.recipes or sorted(shipped_recipes())
    for _ in range(options.rounds):
        for name in (name for name in names if name not in missing):
            with tempfile.TemporaryDirectory(prefix="compressft-start-") as scratch:
                found = measure(name, options.source.resolve(), Path(scratch))
            if isinstance(found, str):
                missing[name] = found
                console.print(f"{name}: not run: {found}", highlight=False, soft_wrap=True)
                continue
            runs.setdefault(name, []).append(found)
            said = f"{found.first_step:.1f} s to the first step, {found.peak_bytes / 1e6:.0f} MB"
            console.print(f"{name}: {said}", highlight=False)
    document = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks start",
        "rounds": options.rounds,
        "recipes": {name: asdict(quietest(found)) for name, found in runs.items() if name not in missing},
        "not_run": missing,
        "hardware": hardware(),
        "versions": versions(),
    }
    options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    options.json.with_suffix(".md").write_text(table(document), encoding="utf-8")
    print(table(document))
    return 0
