"""Open an exported model with plain onnxruntime and run batches through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressft.data.tasks import Task
from compressft.foreign import foreign


def open_session(model: str | Path | bytes, threads: int | None = None, exact: bool = False) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: a file, or its content.
        exact: take kernels that add u8 x s8 products in 32 bits also where the processor has faster ones that saturate.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Several live sessions would spin against each other; measuring has a process of its own.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if threads:
        options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    with foreign(f"{'the model' if isinstance(model, bytes) else model}: onnxruntime cannot open it"):
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def session_logits(session: Any, task: Task, features: Sequence[Mapping[str, Any]], batch: int) -> list[np.ndarray]:
    """Logits per row (padding cut off for token tasks), in the rows' order, computed in padded batches.

    Batches take neighbours in length, as a server that sorts its queue would.
    """
    names = {value.name for value in session.get_inputs()}
    rows: list[Any] = [None] * len(features)
    for indices in batches_by_length(features, batch):
        padded = task.collate([{k: v for k, v in features[i].items() if k != "labels"} for i in indices])
        feed = {name: tensor.numpy() for name, tensor in padded.items() if name in names}
        logits = session.run(["logits"], feed)[0]
        scatter(rows, indices, logits, features)
    return rows


def scatter(rows: list[Any], indices: Sequence[int], logits: np.ndarray, features: Sequence[Mapping[str, Any]]) -> None:
    """Store a batch's logits by row; (B, T, C) logits lose their padding."""
    for i, value in zip(indices, logits, strict=True):
        rows[i] = value[: len(features[i]["input_ids"])] if logits.ndim == 3 else value


def batches_by_length(features: Sequence[Mapping[str, Any]], batch: int) -> list[list[int]]:
    """Row indices in batches of similar length."""
    order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
    return [order[i : i + batch] for i in range(0, len(order), batch)]
