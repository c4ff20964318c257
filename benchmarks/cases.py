"""Runs of many recipes, each kept by the hash of what it was asked: an interrupted night goes on where it stopped."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.measure import hardware, versions
from compressft.recipe import parse_recipe
from compressft.run import run

ROOT = Path("runs") / "benchmarks"


def data_folder() -> Path:
    """Where the task data is: COMPRESSFT_DATA, else shared/data beside the repository."""
    folder = Path(os.environ.get("COMPRESSFT_DATA", Path("..") / "shared" / "data"))
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; set COMPRESSFT_DATA to the folder with sst2/ and banking77/")
    return folder


@dataclass(frozen=True)
class Case:
    """One recipe as plain data. Strings may hold {data} and {runs}; `after` names the cases whose folders it reads.

    `keep`: whether the run's folder stays (another case reads it, or its file is looked at).
    """

    name: str
    group: str
    recipe: Mapping[str, Any]
    after: tuple[str, ...] = ()
    keep: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of the recipe, the same on every machine."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, suite: str) -> Path:
        """Its run directory."""
        return ROOT / suite / f"{self.name}-{self.key}"


def results(path: Path) -> dict[str, Any]:
    """What earlier runs wrote: {"cases": {name: {...}}}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"cases": {}}


def run_cases(
    suite: str, cases: Sequence[Case], wanted: Sequence[Case], path: Path, console: Console
) -> dict[str, Any]:
    """Run what is missing of `wanted`, and what that stands on; each result is written as soon as it is there.

    Args:
        cases: all cases of the suite, by whose names `after` refers.
        path: the JSON file of results.
    """
    by_name = {case.name: case for case in cases}
    document = results(path)
    for case in wanted:
        found = document["cases"].get(case.name)
        if found is not None and found["key"] == case.key:
            continue
        for name in case.after:
            _run(suite, by_name[name], by_name, console)
        record = _run(suite, case, by_name, console)
        # Others may have written meanwhile.
        document = results(path)
        document["cases"][case.name] = {"key": case.key, "group": case.group, **case.facts, **record}
        document |= {"versions": versions(), "hardware": hardware()}
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(".tmp")
        staging.write_text(json.dumps(document, indent=1), encoding="utf-8")
        staging.rename(path)
        if not case.keep:
            shutil.rmtree(case.folder(suite), ignore_errors=True)
    return document


def _run(suite: str, case: Case, by_name: Mapping[str, Case], console: Console) -> dict[str, Any]:
    folder = case.folder(suite)
    written = folder / "report" / "report.json"
    if not written.is_file():
        console.print(f"{case.name}: running", highlight=False)
        document = _filled(suite, case, by_name)
        started = time.monotonic()
        run(parse_recipe(document, case.name), folder, (folder / "recipe.yaml").is_file(), console)
        console.print(f"{case.name}: {time.monotonic() - started:.0f} s", highlight=False)
    report = json.loads(written.read_text(encoding="utf-8"))
    keys = ("quality", "parity", "size_bytes", "parameters", "latency_ms", "shapes", "training", "flops")
    record = {key: report[key] for key in keys if key in report}
    record["validation"] = [stage["validation"] for stage in report["stages"]]
    return {"date": date.today().isoformat(), **record}


def _filled(suite: str, case: Case, by_name: Mapping[str, Case]) -> dict[str, Any]:
    values = {"data": str(data_folder())} | {name: str(by_name[name].folder(suite)) for name in case.after}

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            for name, path in values.items():
                value = value.replace("{" + name + "}", path)
            return value
        if isinstance(value, Mapping):
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list | tuple) else value

    return fill(copy.deepcopy(dict(case.recipe)))
