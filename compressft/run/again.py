"""Do parts of a finished run again: export with other settings, write the report files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.errors import UserError
from compressft.export.flow import baseline_folder, export, stage_record
from compressft.model.saved.folders import MANIFEST, read_manifest
from compressft.model.source import load_tokenizer
from compressft.recipe.document import refuse_edited
from compressft.recipe.recipe import Recipe, load_recipe
from compressft.run.analyse import analysed
from compressft.run.card import write_cards
from compressft.run.feed import load_shipped
from compressft.run.flow import complete, refuse_export
from compressft.run.folder import held
from compressft.run.identity import UNKNOWN, model_revision, read, refuse_changed
from compressft.run.report import load_metrics, write_report
from compressft.utils.entries import refuse_links
from compressft.utils.phases import AGAIN, SECONDS, Clock, kept, seconds, watched
from compressft.utils.quiet import quiet_libraries
from compressft.utils.texts import read_object
from compressft.utils.visible import PlainConsole


def export_again(root: str | Path, overrides: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Export a trained run once more, with overrides below `export.`; the run's recipe file is left as it is.

    Raises:
        UserError: not a finished run, an override of something else than export, another recipe than the one that was
            trained, or data that has changed since.
        VerificationError: as `run`.
    """
    other = [o for o in overrides if not o.startswith("export.")]
    if other:
        raise UserError(f"--set {other[0]!r}: training is done; only export.* can be set here")
    quiet_libraries()
    folder = finished_run(root)
    console = console or PlainConsole(stderr=True)
    with held(folder):
        refuse_edited(folder / "recipe.yaml", read_manifest(folder / "model", "model").get("recipe_hash"))
        recipe = load_recipe(folder / "recipe.yaml", overrides)
        refuse_export(recipe)
        _refuse_changed(recipe, folder, console)
        return _export(recipe, folder, console)


def _refuse_changed(recipe: Recipe, folder: Path, console: Console) -> None:
    """Compare what an export reads: all data, of the base its labels, its weights where the run has no dense stage."""
    begun, dense = read(folder), baseline_folder(recipe, folder)
    if begun is None:
        console.print(f"{folder}: {UNKNOWN}", highlight=False, soft_wrap=True)
        return
    reads = ("data.", "model/config.json" if dense else "model")
    refuse_changed(begun, recipe, [stage.name for stage in recipe.stages], lambda key: key.startswith(reads))


def _export(recipe: Recipe, folder: Path, console: Console) -> dict[str, Any]:
    stages = [stage_record(folder, stage.name) for stage in recipe.stages]
    with watched(console, Clock()) as clock:
        clock.add({name: value for name, value in kept(folder / SECONDS).items() if name not in AGAIN})
        splits = load_shipped(recipe, load_tokenizer(str(folder / "model"))).splits
        exported = export(recipe, folder, splits, console)
        report = complete(exported, recipe, stages, model_revision(folder)) | analysed(recipe, folder)
        report = write_report(report, load_metrics(folder / "metrics.jsonl"), folder / "report", seconds)
        write_cards(recipe, folder, report)
        return report


def report_again(root: str | Path) -> dict[str, Any]:
    """Write a run's report files once more from report.json and metrics.jsonl."""
    folder = finished_run(root)
    path = folder / "report" / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist; the run has not been exported: compressft export {folder}")
    report = read_object(path)
    with held(folder):
        write_report(report, load_metrics(folder / "metrics.jsonl"), folder / "report")
    return report


def finished_run(root: str | Path) -> Path:
    """A run directory whose training is done.

    Raises:
        UserError: it is none, or has links out of it.
    """
    folder = Path(root)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{str(root)!r}: is no run directory (it has no recipe.yaml)")
    if not (folder / "model" / MANIFEST).is_file():
        fix = f"go on with: compressft run ... --output {root} --resume"
        raise UserError(f"{str(root)!r}: its training is not finished; {fix}")
    refuse_links(folder)
    return folder
