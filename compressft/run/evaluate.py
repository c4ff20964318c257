"""Score a shipped folder (torch `model/`, `delta/` or ONNX) on a data file, with the task's own metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressft.data.splits import Source
from compressft.errors import UserError, nearest
from compressft.model.saved.compressed import load_compressed
from compressft.model.saved.delta import load_delta
from compressft.model.saved.folders import MANIFEST, read_manifest
from compressft.model.saved.manifest import require
from compressft.model.source import load_tokenizer
from compressft.recipe.program import parse_task
from compressft.tasks import TASKS, make_task
from compressft.tasks.encode import cut, encoded
from compressft.utils.foreign import load_config


def evaluate(source: str | Path, data: str | Path, batch: int = 32) -> dict[str, Any]:
    """Metrics of a model on a file.

    Args:
        source: a run directory, a `model/`, `delta/` or `onnx/` folder, or a `model.onnx` file.
        data: JSONL, CSV or Parquet with the columns of the recipe.
        batch: rows at a time; what of the logits is in memory.

    Returns:
        {"runtime", "rows", metric name: value, ..., "portable"}; the last says whether the ONNX file that this is or
        becomes gives the same answers on every processor, and "note" where it does not or rows were cut.

    Raises:
        UserError: nothing of ours at `source`, or a wrong file, column or label.
    """
    from compressft.evaluation.logits import open_session, scored, scoring_run, session_run
    from compressft.export.portable import model_portability, portability

    path = Path(source)
    if not path.exists():
        raise UserError(f"evaluate: {str(path)!r} does not exist; give a run directory, model/, onnx/ or model.onnx")
    folder = path.parent if path.suffix == ".onnx" else path
    if (folder / "recipe.yaml").is_file():
        folder = folder / "model"
    manifest = read_manifest(folder)
    if "task" not in manifest:
        raise UserError(f"evaluate: {folder} does not say what task it was trained for; give model/, delta/ or onnx/")
    require(manifest, ("labels", "max_length", "columns"), folder / MANIFEST)
    if manifest["task"] not in TASKS:
        raise UserError(
            f"{folder / MANIFEST}: task {manifest['task']!r} is not known; known: {', '.join(TASKS)}"
            f"{nearest(manifest['task'], TASKS)}"
        )
    try:
        settings = parse_task(manifest.get("task_settings", manifest["task"]))
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST}: field 'task_settings': {error}; restore the file") from None
    if settings.type != manifest["task"]:
        raise UserError(f"{folder / MANIFEST}: task {manifest['task']!r} and task_settings differ; restore the file")
    rows = Source.of_files((str(data),)).table(manifest["columns"], TASKS[manifest["task"]].fields)
    tokenizer = load_tokenizer(str(folder))
    model: Any = None
    if manifest["kind"] != "onnx":
        model = (load_delta if manifest["kind"] == "delta" else load_compressed)(folder)
    config = load_config(folder, str(folder)) if model is None else model.config
    task = make_task(settings, tokenizer, manifest["max_length"], manifest["labels"], config)
    features = encoded(rows, task)
    if model is None:
        file = path if path.suffix == ".onnx" else folder / "model.onnx"
        proof = portability(file)
        runtime, run = "onnxruntime", session_run(open_session(file), task)
    else:
        proof = model_portability(model)
        runtime, run = "torch", scoring_run(model, task)
    result = {"runtime": runtime, "rows": len(rows), **scored(run, task, features, batch)}
    notes = [note for note in (cut((rows,), task), proof.warning()) if note]
    return {**result, "portable": proof.portable, **({"note": "; ".join(notes)} if notes else {})}
