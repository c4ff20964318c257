"""The flow of a run, top-down: load, train each stage, save, export, report."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.errors import UserError
from compressft.export.flow import export
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, save_delta
from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import Recipe
from compressft.run.analyse import analysed
from compressft.run.card import write_cards
from compressft.run.extras import refuse_missing
from compressft.run.feed import FeedRows, load_feeds, model_info
from compressft.run.folder import open_folder
from compressft.run.identity import identify, model_revision, with_threads
from compressft.run.program import train_stages
from compressft.run.records import Run, Trained
from compressft.run.report import load_metrics, write_report
from compressft.run.stage import SETTLE_ROWS, settled, unchanged
from compressft.tasks import TASKS
from compressft.tasks.encode import cut
from compressft.utils import ranks
from compressft.utils.machine import peak_memory
from compressft.utils.memory import keep_freed_memory, release
from compressft.utils.phases import SECONDS, Clock, keep, kept, phase, seconds, watched
from compressft.utils.quiet import quiet_libraries
from compressft.utils.visible import PlainConsole


def run(
    recipe: Recipe, output: str | Path, resume: bool = False, console: Console | None = None, spent: float = 0.0
) -> dict[str, Any]:
    """Run a recipe into a directory.

    Where torchrun or `accelerate launch` has started several processes, all train, and the first alone writes, exports
    and tells.

    Args:
        output: the run directory (layout: README).
        resume: go on with an interrupted run of the same recipe.
        console: where progress goes; standard error by default.
        spent: seconds that went by before, of imports: the report counts them as loading.

    Returns:
        the report (the content of `report/report.json`), in every process.

    Raises:
        UserError: a mistake in recipe, data or directory.
        VerificationError: the exported file misses the recipe's tolerances.
        Interrupted: stopped by SIGINT or SIGTERM; a checkpoint was published.
    """
    refuse_export(recipe)
    refuse_missing(recipe)
    ranks.start()
    console = console or PlainConsole(stderr=True)
    if not ranks.first():
        console = Console(quiet=True)
    quiet_libraries()
    keep_freed_memory()
    with open_folder(output, recipe, resume) as folder, watched(console, Clock(spent)) as clock:
        clock.add(kept(folder.root / SECONDS))
        begun = ranks.shared(identify(folder.root, recipe, console) if ranks.first() else None)
        with with_threads(begun.threads):
            return _run(Run(recipe, folder, console, begun.processes))


def _run(run: Run) -> dict[str, Any]:
    feeds = load_feeds(run.recipe, load_tokenizer(run.recipe.model))
    for rows in feeds.sources:
        _introduce(run, rows)
    trained = train_stages(run, feeds)
    report = ship(run, feeds.shipped, trained) if ranks.first() else None
    return ranks.shared(report)


def _introduce(run: Run, rows: FeedRows) -> None:
    """Say what a feed's rows are, and what of them nothing is made of."""
    splits, data = rows.splits, rows.feed.data
    names = ("train", "validation", "test", *(["unlabelled"] if splits.unlabelled else []))
    counted = ", ".join(f"{len(getattr(splits, name))} {name}" for name in names)
    if splits.stream is not None:
        counted = f"a stream of training rows, of which {len(splits.train)} are looked at; {counted.partition(', ')[2]}"
    reasons = " and ".join(f"{rows.feed.field}.{name}" for name in ("per_class", "limit") if getattr(data, name))
    left = f"; {splits.left_out} of {len(splits.known)} training rows left out ({reasons})" if splits.left_out else ""
    whose = f"{run.recipe.name}, {rows.feed.source}" if rows.feed.source else run.recipe.name
    run.say(f"{whose}: {counted} rows{left}")
    lost = cut((splits.train, splits.validation, splits.test), rows.task)
    if lost:
        run.say(lost)


def refuse_export(recipe: Recipe) -> None:
    """Say before any work that a model will have no ONNX form.

    Raises:
        UserError: it has none, and the recipe wants one.
    """
    task = recipe.shipped.task.type
    if recipe.export.enabled and TASKS[task].ships is None:
        raise UserError(
            f"export: models of task {task!r} have no ONNX file; set export.enabled to false to ship model/ alone"
        )
    for stage in recipe.stages if recipe.export.enabled else ():
        for transform in stage.transforms:
            if not transform.exports:
                raise UserError(
                    f"stages.{stage.name}: {transform.type!r} leaves a model that has no ONNX form; "
                    "set export.enabled to false to train it and ship model/"
                )


def ship(run: Run, rows: FeedRows, trained: Trained) -> dict[str, Any]:
    """Save the trained model, export it and write the report, which is returned."""
    recipe, folder, task, model = run.recipe, run.folder, rows.task, trained.model
    info = model_info(recipe, rows, folder.recipe_hash)
    save_compressed(model, task.tokenizer, folder.root / "model", info)
    sample = rows.validation[:SETTLE_ROWS]
    with phase("loading"):
        loaded = load_compressed(folder.root / "model")
    before, after = (settled(one, task, sample, recipe.evaluation_batch) for one in (model, loaded))
    unchanged("saving and loading model/", before, after)
    del loaded
    base = recipe.model
    if recipe.delta_from is not None:
        base, info = str(folder.stage(recipe.delta_from)), {**info, "from_stage": recipe.delta_from}
    save_delta(model, task.tokenizer, base_tensors(base, type(model).__name__), folder.root / "delta", info)
    # Export reads what was saved.
    release(model)
    exported = export(recipe, folder.root, rows.splits, run.console)
    report = complete(exported, recipe, trained.stages, model_revision(folder.root))
    report |= analysed(recipe, folder.root)
    keep(folder.root / SECONDS)
    report = write_report(report, load_metrics(folder.metrics), folder.root / "report", seconds)
    write_cards(recipe, folder.root, report)
    # The teachers' answers, hundreds of megabytes, that only a resumed training would read.
    shutil.rmtree(folder.root / "cache", ignore_errors=True)
    return report


def complete(
    exported: dict[str, Any], recipe: Recipe, stages: list[dict[str, Any]], revision: str | None
) -> dict[str, Any]:
    """The whole report: what export measured, what training recorded, which recipe and commit of its model it was."""
    head = {"name": recipe.name, "model": recipe.model, "task": recipe.shipped.task.type}
    if revision is not None:
        head["model_revision"] = revision
    tail = {
        "stages": stages,
        "training": training_figures(stages),
        # Export and verification included: the system counts from the process's start.
        "peak_memory_bytes": max(peak_memory(), *(s["peak_memory_bytes"] for s in stages)),
        "recipe_hash": recipe.hash,
        "recipe": recipe.to_yaml(),
    }
    return head | exported | tail


def training_figures(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The report's `training` key: totals over stages, rates weighted by time."""
    seconds = sum(s["seconds"] for s in stages)

    def rate(key: str) -> float:
        return sum(s[key] * s["seconds"] for s in stages) / seconds

    return {
        "seconds": seconds,
        "examples_per_second": rate("examples_per_second"),
        "tokens_per_second": rate("tokens_per_second"),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages),
    }
