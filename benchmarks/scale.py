"""Whether several processes train what one does, with copies (DDP) and with pieces (FSDP2) of the weights.

1, 2 and 4 processes (gloo) take the same rows of every step. On a machine with fewer cores than processes the seconds
are of work, all processes' together: what dividing a step costs, not how fast it gets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from benchmarks.cases import results, update
from compressft.errors import UserError

RESULTS = Path(__file__).parent / "results" / "scale.json"
KINDS = {"DDP": {}, "FSDP2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
PROCESSES = (2, 4)
# Distances that count as equal, as shares of how far training went: sums in another order, and one flipped rounding of
# int8, which is a per cent of an activation.
LIMIT, ROUNDED = 1e-3, 0.15


def launched(folder: Path, processes: int, environment: Mapping[str, str]) -> Path:
    """So many processes' figures and weights, in this folder.

    Raises:
        UserError: they failed.
    """
    folder.mkdir()
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), "-m", "benchmarks.scale_worker", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{processes} processes failed: {done.stderr[-2000:]}")
    return folder


def distance(one: Path, other: Path, name: str) -> float:
    """How far two ends of a case's training are apart, as a share of how far the first went from its start (L2)."""
    start, want, got = (load_file(one / f"{name}.start"), *(load_file(root / f"{name}.state") for root in (one, other)))
    # A threshold begins at minus infinity.
    names = [key for key, value in start.items() if value.is_floating_point() and value.isfinite().all()]
    apart = sum(float((got[key] - want[key]).double().square().sum()) for key in names)
    went = sum(float((want[key] - start[key]).double().square().sum()) for key in names)
    return (apart / went) ** 0.5


def compared(one: Path, other: Path) -> dict[str, dict[str, Any]]:
    """By case: distances, and figures next to those of one process."""
    alone, found = (json.loads((root / "found.json").read_text(encoding="utf-8")) for root in (one, other))
    return {
        name: {
            "weights": distance(one, other, name),
            "loss": abs(its["loss"] - alone[name]["loss"]) / alone[name]["loss"],
            "work": its["seconds"] / alone[name]["seconds"],
            "held": its["held"] / alone[name]["held"],
            "differing": len(its["differing"]),
        }
        for name, its in found.items()
    }


def unequal(document: Mapping[str, Any]) -> list[str]:
    """What is further from one process than rounding takes it."""
    return [
        f"{arrangement}, {name}"
        for arrangement, cases in document["cases"].items()
        for name, its in cases.items()
        if its["differing"] or not its["weights"] <= (ROUNDED if name == "int8" else LIMIT)
    ]


def render(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    head = [
        "# Several processes",
        "`python -m benchmarks scale`; MiniLM-L6, fp32, 16 rows of 32 tokens a step over all processes, 6 steps, no "
        "dropout, gloo, one thread each. Weights: distance from one process's, as a share of how far training went; "
        "loss: relative difference. Work: processor seconds of a step, all processes together, over one process's: two "
        "cores run four processes, so this is what dividing costs, not a speed. Held: weights and moments in each "
        "process, over one process's.",
    ]
    table = ["| processes | case | weights | loss | work | held |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for arrangement, cases in document["cases"].items():
        for name, its in cases.items():
            figures = f"{its['weights']:.1e} | {its['loss']:.1e} | {its['work']:.2f} | {its['held']:.2f}"
            table.append(f"| {arrangement} | {name} | {figures} |")
    found = unequal(document)
    said = f"Not equal: {'; '.join(found)}." if found else "All are equal to one process within rounding."
    hardware = document.get("hardware", {})
    facts = [f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('cores', '?')} cores"]
    facts += [f"{name} {value}" for name, value in document.get("versions", {}).items()]
    return "\n\n".join([*head, "\n".join(table), said, ", ".join(facts)]) + "\n"


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks scale`; 1 where something is not equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="compressft-scale-") as scratch:
        one = launched(Path(scratch) / "1", 1, {})
        for processes in PROCESSES:
            for kind, environment in KINDS.items():
                console.print(f"{processes} processes, {kind}", highlight=False)
                other = launched(Path(scratch) / f"{processes}-{kind}", processes, environment)
                found = compared(one, other)
                update(RESULTS, lambda document: document["cases"].update({f"{processes} {kind}": found}))  # noqa: B023
    text = render(results(RESULTS))
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if unequal(results(RESULTS)) else 0
