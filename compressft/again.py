"""Do parts of a finished run again: export with other settings, write the report files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.checkpoint import MANIFEST, read_manifest
from compressft.errors import UserError
from compressft.export import export
from compressft.model import load_tokenizer
from compressft.quiet import quiet_libraries
from compressft.recipe import load_recipe
from compressft.report import load_metrics, write_report
from compressft.run import complete, load_task, refuse_export
from compressft.texts import read_object
from compressft.visible import PlainConsole


def export_again(root: str | Path, overrides: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Export a trained run once more, with overrides below `export.`; the run's recipe file is left as it is.

    Raises:
        UserError: not a finished run, or an override of something else than export.
        VerificationError: as `run`.
    """
    other = [o for o in overrides if not o.startswith("export.")]
    if other:
        raise UserError(f"--set {other[0]!r}: training is done; only export.* can be set here")
    quiet_libraries()
    folder = finished_run(root)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    refuse_export(recipe)
    _, splits = load_task(recipe, load_tokenizer(str(folder / "model")))
    stages = [read_manifest(folder / "stages" / stage.name, "model", ("stage",))["stage"] for stage in recipe.stages]
    report = complete(export(recipe, folder, splits, console or PlainConsole(stderr=True)), recipe, stages)
    write_report(report, load_metrics(folder / "metrics.jsonl"), folder / "report")
    return report


def report_again(root: str | Path) -> dict[str, Any]:
    """Write a run's report files once more from report.json and metrics.jsonl."""
    folder = finished_run(root)
    path = folder / "report" / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist; the run has not been exported: compressft export {folder}")
    report = read_object(path)
    write_report(report, load_metrics(folder / "metrics.jsonl"), folder / "report")
    return report


def finished_run(root: str | Path) -> Path:
    """A run directory whose training is done.

    Raises:
        UserError: it is none.
    """
    folder = Path(root)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{str(root)!r}: is no run directory (it has no recipe.yaml)")
    if not (folder / "model" / MANIFEST).is_file():
        fix = f"go on with: compressft run ... --output {root} --resume"
        raise UserError(f"{str(root)!r}: its training is not finished; {fix}")
    return folder
