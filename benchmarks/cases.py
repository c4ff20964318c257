"""Runs of many recipes, each kept by the hash of what it was asked: an interrupted night goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from benchmarks.sentences import cut
from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.run.again import export_again
from compressft.run.flow import run
from compressft.utils.machine import hardware, versions

ROOT = Path("runs") / "benchmarks"


def data_folder() -> Path:
    """Where the task data is: COMPRESSFT_DATA, else shared/data next to the repository.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(os.environ.get("COMPRESSFT_DATA", Path("..") / "shared" / "data"))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set COMPRESSFT_DATA to the folder with sst2/ and banking77/")
    return folder


@dataclass(frozen=True)
class Case:
    """One recipe as plain data; strings may hold placeholders (`filled`). `after` names cases whose folders it reads.

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


def update(path: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Change the results file: read, change, replace, so that a kill loses nothing and two processes may share it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):
        document = results(path)
        change(document)
        document |= {"versions": versions(), "hardware": hardware()}
        staging = path.with_suffix(".tmp")
        staging.write_text(json.dumps(document, indent=1), encoding="utf-8")
        staging.rename(path)
    return document


def run_cases(
    suite: str, cases: Sequence[Case], wanted: Sequence[Case], path: Path, console: Console, again: bool = False
) -> dict[str, Any]:
    """Run what is missing of `wanted`, and what that stands on; each result is written as soon as it is there.

    Args:
        cases: all cases of the suite, by whose names `after` refers.
        path: the JSON file of results.
        again: export and measure kept runs again (a machine may have been busy).
    """
    for case in wanted:
        found = results(path)["cases"].get(case.name)
        folder = case.folder(suite)
        if again and case.recipe["export"].get("enabled", True) and (folder / "report" / "report.json").is_file():
            export_again(folder, (), console)
        elif found is not None and found["key"] == case.key:
            continue
        for name in case.after:
            prepared(suite, next(c for c in cases if c.name == name), cases, console)
        record = {"key": case.key, "group": case.group, **case.facts, **_run(suite, case, cases, console)}
        update(path, lambda document: document["cases"].update({case.name: record}))  # noqa: B023
        if not case.keep:
            shutil.rmtree(case.folder(suite), ignore_errors=True)
    return results(path)


def prepared(suite: str, case: Case, cases: Sequence[Case], console: Console) -> Path:
    """The folder of a case that others read, run if it is not there."""
    _run(suite, case, cases, console)
    return case.folder(suite)


def _run(suite: str, case: Case, cases: Sequence[Case], console: Console) -> dict[str, Any]:
    folder = case.folder(suite)
    written = folder / "report" / "report.json"
    if not written.is_file():
        console.print(f"{case.name}: running", highlight=False)
        folders = {name: str(next(c for c in cases if c.name == name).folder(suite)) for name in case.after}
        document = filled(case.recipe, folders)
        started = time.monotonic()
        run(parse_recipe(document, case.name), folder, (folder / "recipe.yaml").is_file(), console)
        console.print(f"{case.name}: {time.monotonic() - started:.0f} s", highlight=False)
    report = json.loads(written.read_text(encoding="utf-8"))
    keys = ("quality", "parity", "size_bytes", "parameters", "latency_ms", "shapes", "training", "flops")
    record = {key: report[key] for key in keys if key in report}
    record["validation"] = [stage["validation"] for stage in report["stages"]]
    for measured in sorted(folder.glob("memo/latency-*.json")):
        record["costs"] = json.loads(measured.read_text(encoding="utf-8"))
    return {"date": date.today().isoformat(), **record}


def filled(value: Any, folders: Mapping[str, str] | None = None) -> Any:
    """A copy with {data}, {dvd_sentences} and the folders' names replaced by paths."""
    if isinstance(value, str):
        if value == "{dvd_sentences}":
            return str(cut(data_folder() / "amazon_mdsd" / "dvd.jsonl", ROOT / "dvd_sentences.jsonl"))
        for name, path in {"data": str(data_folder()), **(folders or {})}.items():
            value = value.replace("{" + name + "}", path)
        return value
    if isinstance(value, Mapping):
        return {key: filled(item, folders) for key, item in value.items()}
    return [filled(item, folders) for item in value] if isinstance(value, list | tuple) else value
