"""Time an ONNX file node by node with onnxruntime's profiler, in a process of its own that imports little else."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressft.evaluation.inputs import empty_past, sample_inputs
from compressft.export.measure import child_environment, table_rows, timed

REST = "rest"
# Percentile of a node's times that stands for a quiet machine's median: other processes only ever slow it down.
QUIET = 10
# Seconds of untraced runs, and the least and most traced ones.
BUDGET, LEAST, MOST = 1.5, 30, 300


@dataclass
class Timing:
    """Milliseconds of one model: `whole` of one run, `parts` those inside nodes by label, with `nodes` each."""

    whole: float
    parts: dict[str, float]
    nodes: dict[str, int]


def trace(path: Path, batch: int, length: int, threads: int) -> Timing:
    """Time a file whose nodes carry labels, in a process of its own."""
    command = [sys.executable, "-m", "compressft.export.trace", str(path), *map(str, (batch, length, threads))]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    if done.returncode:
        raise RuntimeError(f"measuring {path} failed:\n{done.stderr[-2000:]}")
    return Timing(**json.loads(done.stdout.splitlines()[-1]))


def read_trace(events: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """Milliseconds per label (`QUIET` quantiles of its nodes) and the number of nodes, from a profile of equal runs.

    Nodes that onnxruntime made itself (fusions, copies) belong to the labelled node before them.
    """
    node_times: dict[str, list[float]] = defaultdict(list)
    owner: dict[str, str] = {}
    label = REST
    for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: e["ts"]):
        name = event["name"].removesuffix("_kernel_time")
        if name == event["name"]:
            continue
        label = name.split("|")[0] if "|" in name else label
        node_times[name].append(event["dur"] / 1e3)
        owner.setdefault(name, label)
    parts: dict[str, float] = defaultdict(float)
    for name, samples in node_times.items():
        # Durations are cut to whole microseconds: half of one is missing on average.
        parts[owner[name]] += float(np.percentile(samples, QUIET)) + 5e-4
    return dict(parts), dict(Counter(owner.values()))


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    for name in ("batch", "length", "threads"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    # One after the other: two live sessions' threads would spin against each other.
    whole, _ = _runs(arguments, None, LEAST, BUDGET)
    # The profile of thousands of runs would take longer to read than to make.
    number = min(max(round(1e3 * BUDGET / float(np.median(whole))), LEAST), MOST)
    with tempfile.TemporaryDirectory() as scratch:
        _, file = _runs(arguments, str(Path(scratch) / "trace"), number, 0.0)
        parts, nodes = read_trace(json.loads(Path(file).read_text(encoding="utf-8")))
    print(json.dumps({"whole": float(np.percentile(whole, QUIET)), "parts": parts, "nodes": nodes}))


def _runs(arguments: argparse.Namespace, prefix: str | None, least: int, budget: float) -> tuple[list[float], str]:
    """Milliseconds of single runs, and the profile's file where a prefix is given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.log_severity_level = 3
    if prefix:
        options.enable_profiling = True
        options.profile_file_prefix = prefix
    session = onnxruntime.InferenceSession(arguments.path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    names = [value.name for value in inputs]
    feed = sample_inputs(names, arguments.batch, arguments.length, table_rows(arguments.path))
    feed |= empty_past(inputs, arguments.batch)
    samples = timed(lambda: session.run(None, feed), least=least, budget=budget)
    return samples, session.end_profiling() if prefix else ""


if __name__ == "__main__":
    _child()
