"""Compute the same 200 rows of every kind of file on this processor and on emulated ones, next to torch.

Files come from runs under `runs/benchmarks/`, made where they are missing, or from `--run NAME=FOLDER`. A cell is kept
by the file's hash, the machine and its onnxruntime: what is finished is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.cases import ROOT, results, update
from benchmarks.options import positive
from benchmarks.portable import elsewhere, files, machines
from benchmarks.portable.compare import comparisons
from benchmarks.portable.lack import Lack
from benchmarks.portable.machines import Machine, Ready
from benchmarks.portable.probe import WIDTH, write_probe
from benchmarks.portable.rows import Rows, rows_of
from benchmarks.portable.table import LIMIT, below, render
from compressft.errors import UserError, VerificationError
from compressft.utils.quiet import quiet_libraries

RESULTS = Path(__file__).parents[1] / "results" / "portable.json"
FOLDER = ROOT / "portable"


@dataclass(frozen=True)
class Place:
    """A machine that is ready, and where it works."""

    machine: Machine
    ready: Ready
    folder: Path


@dataclass(frozen=True)
class Result:
    """A finished cell: its `key`, its `figures` or error, and what the machine said `about` itself."""

    file: files.File
    rows: Rows
    place: Place
    key: str
    figures: Mapping[str, Any]
    about: Mapping[str, Any]


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks portable`; 1 where a cell is below the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks portable", description=__doc__)
    parser.add_argument("--machine", nargs="+", metavar="NAME", help="these machines alone")
    parser.add_argument("--file", nargs="+", metavar="NAME", help="these files alone")
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME=FOLDER", help="finished runs to take files from")
    parser.add_argument("--rows", type=positive, default=200, help="how many rows of each file")
    parser.add_argument("--again", action="store_true", help="compute finished cells again")
    parser.add_argument("--elsewhere", action="store_true", help="only open the demo's folder in other packages")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are kept")
    options = parser.parse_args(arguments)
    console, given = Console(stderr=True), runs(options.run)
    wanted, places = files.chosen(options.file), machines.picked(options.machine)
    quiet_libraries()
    if options.elsewhere:
        folder = files.run_folder(files.chosen(["demo"])[0], given, console)
        said = elsewhere.tried(folder, FOLDER, console)
        document = update(options.json, lambda found: _start(found, options.rows)["elsewhere"].update(said))
    else:
        ready = prepared(places, options, console)
        for file in wanted:
            try:
                folder = files.run_folder(file, given, console)
            except VerificationError as error:
                console.print(f"{file.name}: {error}", highlight=False, markup=False)
                continue
            _try(file, folder, ready, options, console)
        document = update(options.json, lambda found: _start(found, options.rows))
    options.json.with_suffix(".md").write_text(render(document), encoding="utf-8")
    print(render(document))
    return 1 if below(document) else 0


def runs(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` by name.

    Raises:
        UserError: it is written otherwise, or there is no such file.
    """
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UserError(f"--run {text}: wants NAME=FOLDER, such as demo=runs/demo")
        files.chosen([name])
        found[name] = Path(folder)
    return found


def _start(document: dict[str, Any], rows: int) -> dict[str, Any]:
    """The document's own facts, and its parts where they are missing."""
    for part in ("files", "machines", "cells", "elsewhere"):
        document.setdefault(part, {})
    document.pop("cases", None)
    command = "python -m benchmarks portable"
    document |= {"date": date.today().isoformat(), "command": command, "rows": rows, "limit": LIMIT}
    document["processor"] = str(machines.processor())
    # "here" may be several processors, of several days.
    order = [machine.name for machine in machines.machines()]
    document["machines"] = dict(
        sorted(document["machines"].items(), key=lambda item: order.index(item[0].split(":")[0]))
    )
    order = [file.name for file in files.FILES]
    document["files"] = dict(sorted(document["files"].items(), key=lambda item: order.index(item[0])))
    return document


def prepared(wanted: Sequence[Machine], options: argparse.Namespace, console: Console) -> list[Place]:
    """Those of the machines that are ready; what the others lack is said and written down."""
    places = []
    for machine in wanted:
        try:
            places.append(Place(machine, machine.prepare(FOLDER), FOLDER))
        except Lack as lack:
            lacking = {"shows": machine.shows, "lacks": str(lack)}
            console.print(f"{machine.name} lacks {lack}", highlight=False, markup=False)
            update(options.json, lambda found: _start(found, options.rows)["machines"].update({machine.title: lacking}))  # noqa: B023
    return places


def _try(file: files.File, run: Path, places: Sequence[Place], options: argparse.Namespace, console: Console) -> None:
    """One file on every machine, each cell written as soon as it is there."""
    rows = rows_of(run, options.rows, FOLDER)
    about = {file.name: entry(file, rows)}
    update(options.json, lambda found: _start(found, options.rows)["files"].update(about))
    for place in places:
        key = cell_key(rows, place)
        kept = results(options.json).get("cells", {}).get(key)
        if kept is not None and kept["file"] == file.name and not options.again:
            continue
        figures, about = computed(run / "onnx" / "model.onnx", rows, place)
        result = Result(file, rows, place, key, figures, about)
        update(options.json, lambda found: write(found, options.rows, result))  # noqa: B023
        said = figures.get("error") or ", ".join(
            f"{c['agreement']:.4f} {c['error']:.3g}" for c in figures["comparisons"]
        )
        console.print(f"{file.name} on {place.machine.name}: {said}", highlight=False, markup=False)


def cell_key(rows: Rows, place: Place) -> str:
    """What a cell's figures depend on."""
    about = (rows.sha256[:16], len(rows.lengths), place.machine.name, place.machine.key, place.ready.version)
    return " / ".join(str(part) for part in about if part != "")


def computed(path: Path, rows: Rows, place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """A cell's figures, or its error; what the machine said about itself."""
    started = time.monotonic()
    try:
        answer = answered(path, rows.batches, place)
    except RuntimeError as error:
        return {"error": str(error)}, {}
    found = comparisons(rows, answer["logits"])
    about = {name: answer[name] for name in ("onnxruntime", "processor", "saturates")}
    return {"comparisons": [asdict(one) for one in found], "seconds": round(time.monotonic() - started, 1)}, about


def answered(path: Path, batches: Sequence[Mapping[str, Any]], place: Place) -> dict[str, Any]:
    """What a machine's script writes for these batches.

    Raises:
        RuntimeError: it failed; the last line that it wrote.
    """
    probe = write_probe(place.folder / "probe.onnx")
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        asked = {"model": str(path.resolve()), "batches": batches, "options": dict(place.machine.options)}
        asked |= {"threads": place.machine.threads, "probe": str(probe.resolve()), "probe_width": WIDTH}
        job.write_text(json.dumps(asked), encoding="utf-8")
        environment = {**os.environ, **place.ready.environment}
        run = subprocess.run(
            [*place.ready.command, str(job), str(answer)], capture_output=True, text=True, env=environment
        )
        if run.returncode or not answer.is_file():
            said = [line for line in run.stderr.strip().splitlines() if "warning: TCG" not in line]
            raise RuntimeError(said[-1] if said else f"ended with exit code {run.returncode}")
        return json.loads(answer.read_text(encoding="utf-8"))


def write(document: dict[str, Any], number: int, result: Result) -> None:
    """Put a result into the document; cells of what the file was before are dropped."""
    _start(document, number)
    title, rows, about = result.place.machine.title, result.rows, result.about
    document["files"][result.file.name] = entry(result.file, rows)
    if about:
        document["machines"][title] = {"shows": result.place.machine.shows, **about}
    found = {"file": result.file.name, "machine": title, "sha256": rows.sha256, "rows": len(rows.lengths)}
    old = [key for key, cell in document["cells"].items() if _replaced(cell, found)]
    for key in old:
        del document["cells"][key]
    document["cells"][result.key] = {**found, **result.figures}
    _start(document, number)


def _replaced(cell: Mapping[str, Any], by: Mapping[str, Any]) -> bool:
    if cell["file"] != by["file"]:
        return False
    return cell["machine"] == by["machine"] or (cell["sha256"], cell["rows"]) != (by["sha256"], by["rows"])


def entry(file: files.File, rows: Rows) -> dict[str, Any]:
    """What the document says of a file."""
    alone, batched = (
        np.concatenate([np.atleast_2d(np.array(row, np.float32)) for row in answers]) for answers in rows.torch.values()
    )
    labels, itself = alone.argmax(-1), float(np.abs(alone - batched).max())
    found = {"shows": file.shows, "sha256": rows.sha256, "bytes": rows.bytes, "task": rows.kind, "split": rows.split}
    return {**found, "labels": len(labels), "distinct": len(np.unique(labels)), "itself": itself}
