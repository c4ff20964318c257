"""Open an exported model with plain onnxruntime and run batches through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from compressft.data.table import taken
from compressft.evaluation.inputs import empty_past
from compressft.evaluation.scores import Scores
from compressft.tasks.encode import lengths_of
from compressft.tasks.task import Feature, Task
from compressft.utils.foreign import foreign
from compressft.utils.machine import default_threads
from compressft.utils.phases import steps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Rows to the outputs of their padded batch, (rows, ...) fp32: logits (B, C) or (B, T, C), or what the task gives.
Run = Callable[[Sequence[Feature]], np.ndarray]


def open_session(model: str | Path | bytes, threads: int | None = None, exact: bool = False) -> InferenceSession:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: a file, or its content.
        threads: None: `default_threads`.
        exact: take kernels that add u8 x s8 products in 32 bits also where the processor has faster ones that saturate.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Several live sessions would spin against each other; measuring has a process of its own.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # What a batch took goes back at once: logits of a vocabulary are large, and there may be several sessions.
    options.enable_cpu_mem_arena = False
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = threads or default_threads()
    source = model if isinstance(model, bytes) else str(model)
    with foreign(f"{'the model' if isinstance(model, bytes) else model}: onnxruntime cannot open it"):
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def session_run(session: InferenceSession, task: Task) -> Run:
    """The model of a session as a `Run`."""
    assert task.ships is not None

    def run(rows: Sequence[Feature]) -> np.ndarray:
        outputs = session.run([task.ships], feed(session, task.inputs(rows)))[0]
        return task.by_row(torch.from_numpy(outputs), len(rows)).numpy()

    return run


def session_logits(session: InferenceSession, task: Task, features: Sequence[Feature], batch: int) -> list[np.ndarray]:
    """Logits per row of an onnxruntime session; see `by_row`."""
    return by_row(session_run(session, task), task, features, batch)


def by_row(run: Run, task: Task, features: Sequence[Feature], batch: int) -> list[np.ndarray]:
    """Outputs per row (paddings cut off for token tasks), in the rows' order, computed in padded batches.

    Batches take neighbours in length, as a server that sorts its queue would. All logits are held at once: for samples.
    """
    rows: dict[int, np.ndarray] = {}
    for indices in batches_by_length(lengths_of(features, task), batch):
        some = taken(features, indices)
        for i, row, value in zip(indices, some, run(some), strict=True):
            rows[i] = task.own(value, row)
    return [rows[i] for i in range(len(features))]


def feed(session: InferenceSession, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """What a session is given for a collated batch: where it has a cache, an empty one and the tokens' places."""
    inputs = session.get_inputs()
    values = {name: tensor.numpy() for name, tensor in batch.items()}
    values["position_ids"] = places(values["attention_mask"])
    values |= empty_past(inputs, len(values["attention_mask"]))
    return {value.name: values[value.name] for value in inputs if value.name in values}


def places(mask: np.ndarray) -> np.ndarray:
    """Which of its row's tokens each one is, (B, T) int64, by the mask alone: paddings on either side do not count."""
    return np.maximum(mask.cumsum(-1) - 1, 0)


def batches_by_length(lengths: Sequence[int] | np.ndarray, batch: int) -> list[list[int]]:
    """Row indices in batches of similar length."""
    order = np.argsort(lengths, kind="stable").tolist()
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def model_run(model: nn.Module, task: Task) -> Run:
    """A torch model, put into eval mode, as a `Run`."""
    return _torch_run(model, task, lambda batch, rows: task.by_row(model(**batch).logits.float(), rows))


def scoring_run(model: nn.Module, task: Task) -> Run:
    """What a torch model is scored by, as a `Run`: what it writes where the task `generates`, else its outputs."""
    if not task.generates:
        return model_run(model, task)
    return _torch_run(model, task, lambda batch, _: task.generate(model, batch))


def _torch_run(model: nn.Module, task: Task, outputs: Callable[[dict[str, Tensor], int], Tensor]) -> Run:
    """`outputs` takes a batch on the model's device, and its number of rows."""
    model.eval()
    device = next(model.parameters()).device

    @torch.no_grad()
    def run(rows: Sequence[Feature]) -> np.ndarray:
        batch = {name: value.to(device) for name, value in task.inputs(rows).items()}
        return outputs(batch, len(rows)).cpu().numpy()

    return run


def model_logits(model: nn.Module, task: Task, features: Sequence[Feature], batch: int = 32) -> list[np.ndarray]:
    """Logits per row of a torch model in eval mode; see `by_row`."""
    return by_row(model_run(model, task), task, features, batch)


def scored(run: Run, task: Task, features: Sequence[Feature], batch: int = 32) -> dict[str, float]:
    """The task's metrics of a model on rows, with one batch of its outputs in memory at a time.

    Args:
        run: of `scoring_run`, or of a session.
    """
    scores = Scores(task)
    for indices in steps(batches_by_length(lengths_of(features, task), batch), "evaluating"):
        rows = taken(features, indices)
        scores.add(torch.from_numpy(run(rows)), task.truth(rows))
    return scores.metrics()
