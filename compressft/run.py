"""The flow of a run, top-down: load, train each stage, save, export, report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from compressft.checkpoint import MANIFEST, base_tensors, load_compressed, read_manifest, save_compressed, save_delta
from compressft.data import TASKS, Splits, Task, load_splits, make_task
from compressft.errors import UserError, VerificationError
from compressft.export.verify import model_logits
from compressft.folder import RunFolder
from compressft.memory import keep_freed_memory
from compressft.model import count, load_model, load_tokenizer, shapes
from compressft.recipe import Recipe, Stage, load_recipe
from compressft.transform import Context

# Rows, and share of the logits' standard deviation, for the checks around finalize and save. One flipped int8 rounding
# moves a logit by about 1 %; a lost mask or range by more than all of it.
SETTLE_ROWS = 64
SETTLE_LIMIT = 0.1
INFO_KEYS = ("task", "labels", "max_length", "columns", "metric")


def run(recipe: Recipe, output: str | Path, resume: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Run a recipe into a directory.

    Args:
        output: the run directory (layout: README).
        resume: go on with an interrupted run of the same recipe.
        console: where progress goes; standard error by default.

    Returns:
        the report (the content of `report/report.json`).

    Raises:
        UserError: a mistake in recipe, data or directory.
        VerificationError: the exported file misses the recipe's tolerances.
        Interrupted: stopped by SIGINT; a checkpoint was published.
    """
    from compressft.export import export
    from compressft.report import load_metrics, write_report

    console = console or Console(stderr=True)
    quiet_libraries()
    keep_freed_memory()
    with RunFolder(output, recipe, resume) as folder:
        tokenizer = load_tokenizer(recipe.model)
        task, splits = load_task(recipe, tokenizer)
        console.print(
            f"{recipe.name}: {len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test rows",
            highlight=False,
        )
        model, stages = train_stages(recipe, folder, task, splits, console)
        info = model_info(recipe, task)
        save_compressed(model, tokenizer, folder.root / "model", info)
        sample = task.encode(splits.validation[:SETTLE_ROWS])
        loaded = load_compressed(folder.root / "model")
        unchanged("saving and loading model/", model_logits(model, task, sample), model_logits(loaded, task, sample))
        save_delta(model, base_tensors(recipe.model), folder.root / "delta", info)
        report = complete(export(recipe, folder.root, splits, console), recipe, stages)
        write_report(report, load_metrics(folder.metrics), folder.root / "report")
        return report


def export_again(root: str | Path, overrides: Sequence[str], console: Console | None = None) -> dict[str, Any]:
    """Export a trained run once more, with overrides below `export.`; the run's recipe file is left as it is.

    Raises:
        UserError: not a finished run, or an override of something else than export.
        VerificationError: as `run`.
    """
    from compressft.export import export
    from compressft.report import load_metrics, write_report

    other = [o for o in overrides if not o.startswith("export.")]
    if other:
        raise UserError(f"--set {other[0]!r}: training is done; only export.* can be set here")
    quiet_libraries()
    folder = finished_run(root)
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    _, splits = load_task(recipe, load_tokenizer(str(folder / "model")))
    stages = [read_manifest(folder / "stages" / stage.name)["stage"] for stage in recipe.stages]
    report = complete(export(recipe, folder, splits, console or Console(stderr=True)), recipe, stages)
    write_report(report, load_metrics(folder / "metrics.jsonl"), folder / "report")
    return report


def report_again(root: str | Path) -> dict[str, Any]:
    """Write a run's report files once more from report.json and metrics.jsonl."""
    from compressft.report import load_metrics, write_report

    folder = finished_run(root)
    path = folder / "report" / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist; the run has not been exported: compressft export {folder}")
    report = json.loads(path.read_text(encoding="utf-8"))
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
        raise UserError(f"{str(root)!r}: its training is not finished; go on with: compressft run ... --output {root} --resume")
    return folder


def complete(exported: dict[str, Any], recipe: Recipe, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole report: what export measured, what training recorded, which recipe it was."""
    head = {"name": recipe.name, "model": recipe.model, "task": recipe.task}
    tail = {"stages": stages, "training": training_figures(stages), "recipe_hash": recipe.hash, "recipe": recipe.to_yaml()}
    return head | exported | tail


def unchanged(step: str, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Compare per-row logits around a step that must not change them.

    Raises:
        VerificationError: they moved by more than rounding (`SETTLE_LIMIT` of their standard deviation).
    """
    import numpy as np

    error = max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True))
    spread = max(float(np.concatenate([np.ravel(a) for a in before]).std()), 1e-6)
    if not error <= SETTLE_LIMIT * spread:
        raise VerificationError(f"{step} changed the logits by up to {error:.3g} (their standard deviation is {spread:.3g})")


def load_task(recipe: Recipe, tokenizer: Any) -> tuple[Task, Splits]:
    """The recipe's rows, and its task with the labels that occur in train."""
    kind = TASKS[recipe.task]
    splits = load_splits(recipe.data, kind.fields)
    return make_task(recipe.task, tokenizer, recipe.data.max_length, kind.labels_of(splits.train)), splits


def model_info(recipe: Recipe, task: Task) -> dict[str, Any]:
    """What a shipped folder must know to be evaluated on its own."""
    values = (recipe.task, list(task.labels), recipe.data.max_length, dict(recipe.data.columns), task.metric)
    return {"model": recipe.model, **dict(zip(INFO_KEYS, values, strict=True))}


def train_stages(
    recipe: Recipe, folder: RunFolder, task: Task, splits: Splits, console: Console
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train all stages one after the other, each from the weights of the one before."""
    import torch
    from transformers import set_seed

    set_seed(recipe.stages[0].train.seed)
    model = load_model(recipe.model, task.auto_class, **task.model_arguments())
    folder.check_space(sum(p.numel() * p.element_size() for p in model.parameters()))
    if torch.cuda.is_available():
        model = model.cuda()
    base = {"shapes": shapes(model), "parameters": count(model)["total"]}
    features = (task.encode(splits.train), task.encode(splits.validation))
    records: list[dict[str, Any]] = []
    for stage in recipe.stages:
        record = folder.finished(stage.name)
        if record is None:
            record = train_stage(stage, model, recipe, folder, task, features, sum(r["steps"] for r in records), console)
            record["base"] = base
            info = {**model_info(recipe, task), "stage": record}
            save_compressed(model, None, folder.stage(stage.name), info)
        else:
            model = load_compressed(folder.stage(stage.name))
        records.append(record)
    return model.cpu().eval(), records


def train_stage(
    stage: Stage,
    model: nn.Module,
    recipe: Recipe,
    folder: RunFolder,
    task: Task,
    features: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    offset: int,
    console: Console,
) -> dict[str, Any]:
    """Train one stage in place, from its newest checkpoint where there is one; returns its record."""
    from transformers import set_seed

    from compressft.progress import Interrupted, Reporter
    from compressft.trainer import CompressionTrainer

    set_seed(stage.train.seed)
    context = Context(stage.transforms, {}, teacher_loader(recipe, folder, task, model), stage.train.seed)
    for transform in stage.transforms:
        transform.prepare(model, context)
    if stage.train.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    found = folder.newest(stage.name)
    checkpoint, manifest = found if found else (None, {"seconds": 0.0, "step": offset})
    done = manifest.get("done", False)
    folder.rewind(manifest["step"], evaluated=not done)
    reporter = Reporter(folder, stage.name, task, stage.train.keep_checkpoints, offset, manifest["seconds"], console)
    trainer = CompressionTrainer(model, task, stage.train, context, *features, folder.staging, [reporter])
    reporter.trainer = trainer
    trainer.tokens = manifest.get("tokens", 0)
    trainable = count(model)["trainable"]
    with closing(reporter):
        if checkpoint and done:
            trainer.restore(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if reporter.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of stage {stage.name!r}; saved")
    sample = features[1][:SETTLE_ROWS]
    masked = model_logits(model, task, sample)
    for transform in stage.transforms:
        transform.finalize(model)
    unchanged(f"stage {stage.name!r}: finalize", masked, model_logits(model, task, sample))
    seconds = reporter.seconds
    return {
        "name": stage.name,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "trainable": trainable,
        "examples_per_second": trainer.state.global_step * stage.train.batch_size * stage.train.gradient_accumulation / seconds,
        "tokens_per_second": trainer.tokens / seconds,
        "peak_memory_bytes": peak_memory(),
        "validation": reporter.evaluations[-1] if reporter.evaluations else {},
        "dense": not stage.passes,
    }


def teacher_loader(recipe: Recipe, folder: RunFolder, task: Task, model: nn.Module) -> Callable[[str], nn.Module]:
    """Loads a teacher: a finished stage by name, else a folder or hub id trained for the same labels."""

    def load(name: str) -> nn.Module:
        if any(stage.name == name for stage in recipe.stages):
            teacher: Any = load_compressed(folder.stage(name), verify=False)
        else:
            teacher = load_model(name, task.auto_class)
            if getattr(teacher.config, "num_labels", None) != getattr(model.config, "num_labels", None):
                raise UserError(f"objective distill.teacher: {name!r} has {teacher.config.num_labels} labels, the task has {len(task.labels)}")
        return teacher.to(next(model.parameters()).device)

    return load


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


def peak_memory() -> int:
    """Peak bytes of this process so far: allocated on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    info = psutil.Process().memory_info()
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except ImportError:
        return getattr(info, "peak_wset", info.rss)


def quiet_libraries() -> None:
    """transformers' own bars and loading tables would hide ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
