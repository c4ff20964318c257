"""Step times side by side: every contestant in a process of its own, all asked for a few steps in turn, round by round.

What else a machine does meets all of them alike, and medians of ratios within a round are what is reported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from compressft.utils.machine import usable_cores

COMMAND = ("-m", "benchmarks.contestant")
WARMUP = 3
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Contestant:
    """A package's method, as `benchmarks.contestant` builds it, and the environment that it runs in.

    `also`: parts of names of further parameters that are trained, so that all contestants train the same ones.
    `keep_memory`: with the allocator settings of `compressft run` (`compressft.utils.memory`).
    """

    package: str
    method: Mapping[str, Any]
    python: Path = field(default_factory=lambda: Path(sys.executable))
    also: Sequence[str] = ()
    keep_memory: bool = False


@dataclass(frozen=True)
class Conditions:
    """What is the same for all contestants of a race."""

    model: str
    device: str = "cpu"
    precision: str = "fp32"
    rounds: int = 5
    steps: int = 5
    threads: int = field(default_factory=usable_cores)


class Process:
    """A contestant at work."""

    def __init__(self, contestant: Contestant, conditions: Conditions) -> None:
        spec = {
            "package": contestant.package,
            "method": contestant.method,
            "also": list(contestant.also),
            "keep_memory": contestant.keep_memory,
            **{name: getattr(conditions, name) for name in ("model", "device", "precision", "threads")},
        }
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(contestant.python), *COMMAND, json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        )

    def answer(self) -> dict[str, Any]:
        """The next line that it writes.

        Raises:
            RuntimeError: it ended instead; the last line of what it complained about.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.complaints.seek(0)
        said = self.complaints.read().strip().splitlines()
        raise RuntimeError(said[-1] if said else f"ended with exit code {self.process.returncode}")

    def steps(self, number: int) -> dict[str, Any]:
        """Let it train so many steps: their milliseconds, and its peak memory so far."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            print(number, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.complaints.close()


def race(contestants: Mapping[str, Contestant], conditions: Conditions, console: Console) -> dict[str, dict[str, Any]]:
    """By name: trained, saved_bytes (what autograd keeps of one forward pass), peak_bytes, rounds (the median step of
    each, ms) and step_ms, the median round; or error, why it could not run.
    """
    results: dict[str, dict[str, Any]] = {}
    processes: dict[str, Process] = {}
    try:
        for name, contestant in contestants.items():
            processes[name] = Process(contestant, conditions)
            try:
                results[name] = {**processes[name].answer(), "rounds": []}
                processes[name].steps(WARMUP)
            except RuntimeError as error:
                results[name] = {"error": str(error)}
                processes.pop(name).close()
        for _ in range(conditions.rounds):
            for name, process in processes.items():
                found = process.steps(conditions.steps)
                results[name]["rounds"].append(median(found["ms"]))
                results[name]["peak_bytes"] = found["peak_bytes"]
    finally:
        for process in processes.values():
            process.close()
    for name, result in results.items():
        if "error" not in result:
            result["step_ms"] = median(result["rounds"])
        said = result.get("error") or f"{result['step_ms']:.0f} ms, {result['saved_bytes'] / 1e6:.1f} MB saved"
        console.print(f"{name}: {said}", highlight=False, markup=False)
    return results


def ratio(result: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    """Step time over the reference's: the median over rounds; None where either could not run."""
    pairs = zip(result.get("rounds", ()), reference.get("rounds", ()), strict=False)
    found = [one / other for one, other in pairs]
    return median(found) if found else None
