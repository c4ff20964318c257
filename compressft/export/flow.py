"""The export of a run: fold, write, verify, measure."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from compressft.data.splits import Splits
from compressft.errors import VerificationError
from compressft.evaluation.logits import scored, scoring_run
from compressft.export.cache import has_cache, with_cache
from compressft.export.continuation import continue_rows
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.locate import diverging_layer
from compressft.export.measure import latencies
from compressft.export.onnx import drop_weights, save, to_graph
from compressft.export.portable import portability
from compressft.export.reached import reached, shapes_to_time
from compressft.export.refuse import refuse_model
from compressft.export.verify import Check, verify
from compressft.model.count import count
from compressft.model.flops import FLOPS_LENGTH, flops
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.folders import manifest_seal, read_manifest, write_manifest
from compressft.model.saved.state import uniform_config
from compressft.model.shrink import shapes
from compressft.model.source import load_tokenizer
from compressft.modules.structure import describe
from compressft.recipe.recipe import Recipe
from compressft.tasks import make_task
from compressft.tasks.encode import cut, encoded
from compressft.tasks.task import Feature, Task
from compressft.utils.entries import MEASURING
from compressft.utils.files import write_atomically
from compressft.utils.machine import hardware, versions
from compressft.utils.memory import give_back, release
from compressft.utils.phases import doing, phase

if TYPE_CHECKING:
    import onnx_ir as ir

# Dead rows and columns are removed; this share of zeros is from single weights.
NOTEWORTHY_ZEROS = 0.1
# Below this share of its bytes in the last stage, a delta is mostly an earlier one's.
DELTA_SHARE = 0.5
# Fields of model/'s manifest that onnx/ has too.
SHIPPED_FIELDS = ("task", "labels", "max_length", "columns", "metric", "model")
# Splits that a file is verified on.
EVALUATED = ("validation", "test")


@dataclass(frozen=True)
class Shipped:
    """What an export is of: the run, its task with the shipped tokenizer, encoded rows by split, model/'s manifest."""

    recipe: Recipe
    root: Path
    task: Task
    encoded: Mapping[str, Sequence[Feature]]
    manifest: Mapping[str, object]


@phase("export")
def export(recipe: Recipe, root: Path, splits: Splits, console: Console) -> dict[str, Any]:
    """Export `root/model` to `root/onnx`, prove it and measure it.

    Returns:
        the report's quality, parity, verification, continuation (of a file with a cache), portable, pair_sums,
        size_bytes, parameters, latency_ms, targets, shapes, versions and hardware.

    Raises:
        VerificationError: the file misses the recipe's limits; it is kept as `onnx.failed/`; an older `onnx/` stays.
    """
    manifest = read_manifest(root / "model", "model", SHIPPED_FIELDS)
    tokenizer = load_tokenizer(str(root / "model"))
    feed = recipe.shipped
    model = load_compressed(root / "model")
    task = make_task(feed.task, tokenizer, feed.data.max_length, manifest["labels"], model.config)
    refuse_model(recipe, model)
    baseline = baseline_folder(recipe, root)
    features = {name: encoded(rows, task) for name, rows in vars(splits).items() if name in EVALUATED and len(rows)}
    shipped = Shipped(recipe, root, task, features, manifest)
    report = describe_run(recipe, root, model, baseline)
    lost = cut((splits.train, splits.validation, splits.test), task)
    if lost and any(one.type == "vocabulary" for stage in recipe.stages for one in stage.passes):
        # What was said before training counted the base's pieces.
        lost += "; the vocabulary that ships has shorter pieces than the base's"
    report["notes"] += [lost] if lost else []
    report["notes"] += step_notes(report["steps"])
    split = splits.report_split
    quality = {"metric": task.metric, "split": split, "baseline": None, "torch": None, "onnx": None}
    # A run of one stage without passes ships its baseline: no need to evaluate it twice.
    dense_ships = baseline is not None and baseline.name == recipe.stages[-1].name
    if baseline is not None and not dense_ships:
        dense = load_compressed(baseline)
        # Its vocabulary may be larger than that of the model that ships.
        own = task.remade(load_tokenizer(str(baseline)))
        quality["baseline"] = score(dense, own, encoded(getattr(splits, split), own), recipe)
        release(dense)
    if not recipe.export.enabled:
        quality["torch"] = score(model, task, features[split], recipe)
        quality["baseline"] = quality["torch"] if dense_ships else quality["baseline"]
        return {**report, "quality": quality}
    checks: list[Check] = []

    def write_and_prove(target: Path) -> None:
        with doing("exporting to ONNX"):
            write_onnx(shipped, model, target)
        give_back()
        console.print("exported to ONNX; verifying", highlight=False)
        proof = portability(target / "model.onnx")
        report.update(proof.rows())
        warning = proof.warning()
        if warning:
            report["notes"].append(warning)
        checks.extend(verify(target / "model.onnx", model, task, features, recipe.export))
        # A file that is known to be wrong on some processors is so on this one, or it is not: the outcome is the same.
        failed = [check for check in checks if check.failure and (not proof.saturates or check.kernels == "exact")]
        if failed and not recipe.smoke:
            raise VerificationError(blame(shipped, model, target, failed[0]))
        if has_cache(recipe):
            continued = continue_rows(target / "model.onnx", model, task, next(iter(features.values())))
            report["continuation"] = [one.row() for one in continued]
            counted = [one for one in continued if not proof.saturates or one.kernels == "exact"]
            reasons = [reason for one in counted if (reason := one.failure(recipe.export.label_agreement))]
            if reasons and not recipe.smoke:
                aside = set_aside(target, root / "onnx.failed")
                raise VerificationError(f"export: {reasons[0]}; the file is kept in {aside}")

    # The folder appears (or replaces an older one) only once its file is proved.
    write_atomically(root / "onnx", write_and_prove)
    # Which file this report is of.
    report["onnx_hash"] = manifest_seal(root / "onnx")
    chosen = [check for check in checks if check.split == split]
    quality |= {"torch": chosen[0].torch, "onnx": min((c.onnx for c in chosen), key=_badness(task))}
    quality["baseline"] = quality["torch"] if dense_ships else quality["baseline"]
    agreements = [c.label_agreement for c in chosen if c.label_agreement is not None]
    report["parity"] = {
        "split": split,
        "max_abs_error": max(c.max_abs_error for c in chosen),
        "label_agreement": min(agreements) if agreements else None,
    }
    report["verification"] = [check.row() for check in checks]
    report["quality"] = quality
    release(model)
    measure(shipped, baseline, report, console)
    found = reached(recipe, model, report, stage_record(root, recipe.stages[0].name)["base"]["shapes"])
    report["targets"] = [one.row() for one in found]
    report["notes"] += [note for one in found if (note := one.note())]
    return report


@phase("evaluation")
def score(model: nn.Module, task: Task, features: Sequence[Feature], recipe: Recipe) -> float:
    """The task's metric of a torch model on a split, in the recipe's evaluation batches."""
    return scored(scoring_run(model, task), task, features, recipe.evaluation_batch)[task.metric]


def _badness(task: Task) -> Callable[[float], float]:
    return (lambda value: value) if task.greater_is_better else (lambda value: -value)


def describe_run(recipe: Recipe, root: Path, model: nn.Module, baseline: Path | None) -> dict[str, Any]:
    """What is known without running anything: parameters, shapes, versions, hardware, bytes of the torch folders."""
    stages = [stage_record(root, stage.name) for stage in recipe.stages]
    counted = count(model)
    return {
        "parameters": {
            "base": stages[0]["base"]["parameters"],
            "total": counted["total"],
            "trainable": stages[-1]["trainable"],
            "nonzero": counted["nonzero"],
        },
        "size_bytes": {
            "base_onnx": None,
            "onnx": None,
            "model": weight_bytes(root / "model"),
            "delta": weight_bytes(root / "delta"),
        },
        "shapes": {"base": report_shapes(stages[0]["base"]["shapes"]), "kept": report_shapes(shapes(model))},
        "flops": {"length": FLOPS_LENGTH, "base": stages[0]["base"].get("flops"), "kept": flops(model, FLOPS_LENGTH)},
        "notes": notes(counted, model, weight_bytes(root / "delta")) + delta_notes(recipe, root, stages),
        "steps": steps(recipe, stages, baseline),
        "latency_ms": [],
        "parity": None,
        "versions": versions(),
        "hardware": hardware(),
    }


def notes(counted: Mapping[str, int], model: nn.Module, delta_bytes: int) -> list[str]:
    """What a reader could mistake: zeros that are still there."""
    zeros = 1 - counted["nonzero"] / counted["total"]
    if zeros < NOTEWORTHY_ZEROS:
        return []
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    return [
        f"{100 * zeros:.0f} % of the parameters are zeros inside matrices. Dense runtimes multiply zeros at full cost: "
        "the ONNX file is neither faster nor smaller for them. What they save is storage: delta/ holds pruned matrices "
        f"as bits and values, {delta_bytes / 1e6:.1f} MB; the dense parameters take {dense / 1e6:.1f} MB. For speed, "
        "remove structures (pass 'structured' or 'ziplm')."
    ]


def steps(recipe: Recipe, stages: Sequence[Mapping[str, Any]], baseline: Path | None) -> dict[str, int | None]:
    """Optimiser steps of the dense baseline and of the model that ships, each with all stages before it."""
    names = [stage.name for stage in recipe.stages]
    dense = None if baseline is None else sum(one["steps"] for one in stages[: names.index(baseline.name) + 1])
    return {"baseline": dense, "shipped": sum(one["steps"] for one in stages)}


def step_notes(steps: Mapping[str, int | None]) -> list[str]:
    """That a baseline was trained for less, where it was: what it lacks in quality may be that."""
    dense, shipped = steps["baseline"], steps["shipped"]
    if dense is None or dense == shipped:
        return []
    return [
        f"the dense baseline had {dense:,} optimiser steps, the model that ships {shipped:,} in all: "
        "a difference in quality is of both, compression and training"
    ]


def delta_notes(recipe: Recipe, root: Path, stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """That most of `delta/` is an earlier stage's, where a folder of the last one's alone would be small."""
    if len(stages) < 2 or recipe.delta_from is not None:
        return []
    trained, whole = 4 * stages[-1]["trainable"], weight_bytes(root / "delta")
    if trained > DELTA_SHARE * whole:
        return []
    before, last = stages[-2]["name"], stages[-1]["name"]
    return [
        f"delta/ holds what all stages changed, {whole / 1e6:.1f} MB; {last} trained {trained / 1e6:.1f} MB of it. "
        f"`delta_from: {before}` keeps those alone, for whoever has stages/{before}."
    ]


def report_shapes(layers: list[dict[str, int]]) -> list[dict[str, int]]:
    """Shapes as shown: KV heads only where they are not the heads."""
    same = all(layer["heads"] == layer["kv_heads"] for layer in layers)
    return [{k: v for k, v in layer.items() if not (same and k == "kv_heads")} for layer in layers]


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def baseline_folder(recipe: Recipe, root: Path) -> Path | None:
    """The dense model trained in the same run: the first stage of the shipped task and data, where it and all before
    it remove and round nothing."""
    for stage in recipe.stages:
        # What follows a stage that compresses is no dense model, whatever it does itself.
        if not stage_record(root, stage.name).get("dense", not stage.passes):
            return None
        if recipe.feed(stage).origin == recipe.shipped.origin:
            return root / "stages" / stage.name
    return None


def stage_record(root: Path, name: str) -> dict[str, Any]:
    """What was recorded of a finished stage."""
    return read_manifest(root / "stages" / name, "model", ("stage",))["stage"]


def write_onnx(shipped: Shipped, model: nn.Module, target: Path) -> None:
    """Write `model.onnx`, tokenizer, configuration and manifest into a folder."""
    recipe, task, manifest = shipped.recipe, shipped.task, shipped.manifest
    sample = sample_batch(task, shipped.encoded)
    inputs = with_cache(model, sample) if has_cache(recipe) else sample
    graph = to_graph(fold(model), inputs)
    if recipe.export.attention == "qattention":
        fuse_qattention(graph)
    name_answer(graph, task)
    save(graph, target / "model.onnx")
    drop_weights(graph)
    task.tokenizer.save_pretrained(target)
    # Readers of a cache take the number of heads from there.
    uniform_config(model).save_pretrained(target)
    if has_cache(recipe):
        model.generation_config.save_pretrained(target)  # type: ignore[union-attr, operator]
    kinds = sorted({str(entry["kind"]) for entry in describe(model).values()})
    also = {key: manifest[key] for key in ("task_settings",) if key in manifest}
    info = {**{key: manifest[key] for key in SHIPPED_FIELDS}, **also, "shapes": shapes(model), "modules": kinds}
    write_manifest(target, "onnx", info)


def name_answer(graph: ir.Model, task: Task) -> None:
    """Name the output that answers as readers of the task's files expect it."""
    for value in graph.graph.outputs:
        if value.name == "logits":
            assert task.ships is not None
            value.name = task.ships


def sample_batch(task: Task, encoded: Mapping[str, Sequence[Feature]]) -> dict[str, torch.Tensor]:
    """Two padded rows to trace with."""
    rows = list(next(iter(encoded.values()))[:2])
    rows = rows if len(rows) > 1 else rows * 2
    batch = task.inputs(rows)
    if batch["input_ids"].shape[1] < 2:
        # A dimension of 1 would be taken for a constant.
        batch = {name: value.repeat(1, 2) for name, value in batch.items()}
    return batch


def blame(shipped: Shipped, model: nn.Module, folder: Path, check: Check) -> str:
    """Why the export failed and where it diverged; the folder is moved aside so that nobody ships it."""
    sample, aside = sample_batch(shipped.task, shipped.encoded), shipped.root / "onnx.failed"
    where = diverging_layer(folder / "model.onnx", model, sample, exact=check.kernels == "exact")
    ran = f"{check.split}, batch {check.batch}, {check.kernels} kernels"
    return f"export: {check.failure} ({ran}); {where}; the file is kept in {set_aside(folder, aside)}"


def set_aside(folder: Path, aside: Path) -> Path:
    """Move a folder that must not ship out of the way; returns where it is."""
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


@phase("latency")
def measure(shipped: Shipped, baseline: Path | None, report: dict[str, Any], console: Console) -> None:
    """Latency and bytes against the uncompressed model: its fp32 ONNX as transformers exports it, and torch eager."""
    recipe, root, task, encoded = shipped.recipe, shipped.root, shipped.task, shipped.encoded
    console.print("measuring latency", highlight=False)
    with tempfile.TemporaryDirectory(prefix=MEASURING, dir=root) as scratch:
        dense_folder = baseline or Path(scratch) / "dense"
        if baseline is None:
            dense = load_model(recipe.model, task.auto_class, new_head=True, **task.model_arguments())
            save_compressed(dense, None, dense_folder, {})
        dense = load_compressed(dense_folder)
        base_file = Path(scratch) / "base.onnx"
        with doing("exporting the uncompressed model"):
            graph = to_graph(dense, sample_batch(task, encoded), tidy=False)
            save(graph, base_file)
        drop_weights(graph)
        release(dense)
        models = {
            ("onnxruntime", "compressed"): root / "onnx" / "model.onnx",
            ("onnxruntime", "base_fp32"): base_file,
            ("torch", "base_fp32"): dense_folder,
        }
        options = recipe.export
        report["latency_ms"] = latencies(models, shapes_to_time(recipe), options.threads, options.latency_rounds)
        report["size_bytes"]["base_onnx"] = onnx_bytes(base_file)
    report["size_bytes"]["onnx"] = onnx_bytes(root / "onnx" / "model.onnx")
    report["size_bytes"]["onnx_tensors"] = tensor_bytes(root / "onnx" / "model.onnx")


def tensor_bytes(path: Path) -> int:
    """Bytes of an ONNX file's weights, without its graph."""
    import onnx

    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
    )


def onnx_bytes(path: Path) -> int:
    """Bytes of an ONNX file and its data file."""
    data = path.with_name(path.name + ".data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)
