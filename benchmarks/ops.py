"""Check, tune and time the kernels' operators next to every peer that this environment has, on random data.

Writes JSON and a table. With --device cpu the plain-torch twins are timed next to eager PyTorch and torch.compile.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compressft_kernels import dispatch
from compressft_kernels.benchmark.cases import Case, Operands, Way
from compressft_kernels.benchmark.run import default_dtype, measure
from compressft_kernels.nf4 import BLOCK

from benchmarks import tune
from compressft.utils.machine import hardware, versions

RESULTS = Path(__file__).parent / "results"
TABLE = Path(dispatch.__file__).parent / "table.json"


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks ops`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks ops", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/ops-DEVICE.json")
    parser.add_argument("--only", nargs="+", choices=dispatch.OPERATIONS, default=dispatch.OPERATIONS, metavar="OP")
    parser.add_argument("--quick", action="store_true", help="small shapes, in seconds; not for the record")
    parser.add_argument("--no-tune", action="store_true", help="time the table's settings as they are")
    parser.add_argument("--tune-seconds", type=float, default=100.0, metavar="S")
    parser.add_argument(
        "--compile-seconds", type=float, default=150.0, metavar="S", help="what compiling the peers may take in all"
    )
    parser.add_argument("--seconds", type=float, default=440.0, metavar="S", help="no further case is begun after")
    parser.add_argument("--table", type=Path, default=TABLE, help="where tuned settings are written")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU", file=sys.stderr)
        return 2
    document = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", "ops", *arguments]),
        "hardware": hardware(),
        "versions": versions(),
    }
    changes: list[str] = []
    document |= measure(
        options.only,
        options.device,
        quick=options.quick,
        more=more_peers,
        tune=None if options.device == "cpu" or options.no_tune or options.quick else tuner(options, changes),
        compile_seconds=options.compile_seconds,
        seconds=options.seconds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    document["tuned"] = changes
    device = re.sub(r"\W+", "-", document["device"]).strip("-").lower()
    path = options.json or RESULTS / f"ops-{device}{'-quick' if options.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(table(document), encoding="utf-8")
    print(table(document))
    return 1 if document["wrong"] else 0


def tuner(options: argparse.Namespace, changes: list[str]) -> Any:
    """What `measure` calls to tune: writes the table if anything was gained."""

    def run(cases: list[Case]) -> bool:
        device = torch.device("cuda", torch.cuda.current_device())
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        score = tune.Timer(device, default_dtype(device))
        wanted = [case for case in cases if "32768" not in case.name]  # the same rows as 4096, at eight times the cost
        changes.extend(
            tune.tune(
                wanted,
                name,
                dispatch.table_of(capability),
                score,
                options.tune_seconds,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
        )
        if changes:
            tune.write(dispatch.TABLE, options.table)
        return bool(changes)

    return run


def more_peers(case: Case, device: torch.device) -> Mapping[str, Way]:
    """bitsandbytes' 4-bit product, for the NF4 weights without a mask."""
    if case.operation != "packed_linear" or "NF4, no mask" not in case.name or find_spec("bitsandbytes") is None:
        return {}
    return {"bitsandbytes": Way(_bitsandbytes, prepare=_params4bit)}


def _params4bit(o: Operands) -> Operands:
    from bitsandbytes.functional import QuantState

    weight = o["weight"]
    state = QuantState(
        weight.absmax, shape=torch.Size(weight.shape), code=weight.code, blocksize=BLOCK, quant_type="nf4",
        dtype=o["x"].dtype,
    )  # fmt: skip
    return {"bnb": weight.packed.view(-1, 1), "state": state}


def _bitsandbytes(o: Operands) -> torch.Tensor:
    from bitsandbytes.autograd._functions import matmul_4bit

    return matmul_4bit(o["x"], o["bnb"].t(), quant_state=o["state"], bias=o.get("bias"))


def table(document: dict[str, Any]) -> str:
    """The results as Markdown: a table for each operator, its peers as columns."""
    ceilings = document["ceilings"]
    lines = [
        f"# Operators on {document['device']} ({document['date']})",
        "",
        f"`{document['command']}`, {document['seconds']:.0f} s, {document['dtype']}"
        + (f", {document['threads']} threads" if document["device"] == "cpu" else ""),
        "",
        f"Ceilings, measured first: copy {ceilings['bytes_per_second'] / 1e9:.0f} GB/s, product "
        f"{ceilings['flops_per_second'] / 1e12:.3g} TFLOP/s. Times are medians in milliseconds, of the device alone "
        "on a GPU (inputs go round so that its L2 cache does not hold them). Ratios above 1 say that ours is faster; "
        "peers marked * compute less and are a bound. `of roofline`: share of the time that the operator's own bytes "
        "or FLOPs take at the ceilings"
        + ("; on a CPU, caches let it pass 100 %." if document["device"] == "cpu" else "."),
    ]
    verdicts = document["correctness"]
    right = sum(row["right"] for row in verdicts)
    lines += ["", f"Correctness: {right} of {len(verdicts)} results within twice PyTorch's error against float64."]
    lines += [f"- **{name} is wrong**, so it has no ratios: {reason}" for name, reason in document["wrong"].items()]
    timed = [row for row in document["rows"] if row["ms"] is not None]
    noisy = sum(row["ms"] > 1.3 * row["least_ms"] for row in timed)
    lines += ["", f"Noise: in {noisy} of {len(timed)} rows our median is over 1.3 times our fastest call."]
    for operation in dict.fromkeys(row["operation"] for row in document["rows"]):
        lines += ["", f"## {operation}", "", *section([r for r in document["rows"] if r["operation"] == operation])]
    if document["not_measured"]:
        lines += ["", f"Not measured, the time was up: {'; '.join(document['not_measured'])}."]
    if document.get("tuned"):
        lines += ["", "Tuned:", *(f"- {change}" for change in document["tuned"])]
    machine, packages = document["hardware"], document["versions"]
    lines += ["", f"{machine['cpu']}, {machine['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in packages.items())]
    return "\n".join([*lines, ""])


def section(rows: list[dict[str, Any]]) -> list[str]:
    """One operator's table, and below it why peers are missing."""
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    bounds = {name for row in rows for name, found in row["peers"].items() if not found["same"]}
    memory = any(row.get("peak_extra_bytes") is not None for row in rows)
    weights = any(row.get("saved", {}).get("eager", {}).get("weights") for row in rows)
    heads = [
        "case",
        "pass",
        "ours",
        *(f"{name}{' *' if name in bounds else ''}" for name in peers),
        "against best",
        "against eager",
        "of roofline",
    ]
    heads += (["peak extra MiB: ours / eager"] if memory else []) + (
        ["weight-sized saved: ours / eager"] if weights else []
    )
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * (len(heads) - 2)}"]
    for row in rows:
        cells = [row["case"], row["pass"], number(row["ms"])]
        cells += [number(row["peers"].get(name, {}).get("ms")) for name in peers]
        share = row["roofline"]
        cells += [ratio(row, "ratio"), ratio(row, "ratio_eager")]
        cells.append("-" if share is None else f"{100 * share:.0f} % ({row['bound_by']})")
        if memory:
            pair = (row.get("peak_extra_bytes"), row["peers"].get("eager", {}).get("peak_extra_bytes"))
            cells.append(" / ".join("-" if size is None else f"{size / 2**20:.1f}" for size in pair))
        if weights:
            saved = row.get("saved", {})
            cells.append(" / ".join(str(saved[who]["weights"]) if who in saved else "-" for who in ("ours", "eager")))
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"{name}: {reason}" for row in rows for name, reason in row["skipped"].items()]
    reasons += [f"wrong: {row['wrong']}" for row in rows if row["wrong"] is not None]
    return lines + ([""] + [f"- {reason}" for reason in dict.fromkeys(reasons)] if reasons else [])


def ratio(row: dict[str, Any], key: str) -> str:
    """How many times faster than a peer; a wrong operator has none."""
    return "wrong" if row["wrong"] is not None else "-" if row[key] is None else f"{row[key]:.2f}x"


def number(ms: float | None) -> str:
    """Milliseconds in three digits."""
    return "-" if ms is None else f"{ms:.3g}" if ms < 100 else f"{ms:.0f}"
