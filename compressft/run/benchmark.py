"""What `compressft benchmark` measures; works from an installed wheel."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compressft.errors import UserError
from compressft.export.measure import Shape, latencies
from compressft.recipe.recipe import Recipe
from compressft.utils.machine import peak_memory


def parse_shape(text: str) -> Shape:
    """ "8x128" -> (8, 128)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--shape {text!r}: wants BATCHxLENGTH, such as 1x128")
    return int(match[1]), int(match[2])


def edge(models: Sequence[Path], shapes: Sequence[str], threads: int | None, rounds: int) -> list[dict[str, Any]]:
    """Latency rows of ONNX files (or folders with one)."""
    files = {}
    for path in models:
        file = path / "model.onnx" if path.is_dir() else path
        if not file.is_file():
            raise UserError(
                f"benchmark edge: {str(file)!r} does not exist; give an ONNX file or a folder with model.onnx"
            )
        files[("onnxruntime", str(path))] = file
    wanted = [parse_shape(s) for s in shapes]
    try:
        return latencies(files, wanted, threads, rounds)
    except RuntimeError as error:
        raise UserError(f"benchmark edge: {str(error).strip().splitlines()[-1]}") from error


def training(recipe: Recipe, steps: int) -> list[dict[str, Any]]:
    """Step time of every stage on its own data, freshly initialised; teachers are the untrained model."""
    import torch
    from transformers import set_seed

    from compressft.model.count import count
    from compressft.model.load import load_model
    from compressft.model.source import load_tokenizer
    from compressft.run.feed import LengthGroupedSampler, StageRows
    from compressft.run.flow import load_task
    from compressft.transform import Context, trainable
    from compressft.utils.memory import keep_freed_memory
    from compressft.utils.precision import autocast_dtype
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    keep_freed_memory()
    tokenizer = load_tokenizer(recipe.model)
    task, splits = load_task(recipe, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for stage in recipe.stages:
        set_seed(stage.train.seed)

        def fresh(name: str = "") -> Any:
            return load_model(recipe.model, task.auto_class, new_head=True, **task.model_arguments()).to(device)

        model: Any = fresh()
        data = StageRows(task, splits)
        context = Context(stage.transforms, {}, fresh, stage.train.seed, data.data())
        for transform in stage.transforms:
            transform.prepare(model, context)
            transform.after_step(model, 0.0)
        model.train()
        optimizer = torch.optim.AdamW([p for _, p in trainable(model)], lr=1e-5, fused=True)
        features, collate = data.train, data.task.collate
        size = min(stage.train.batch_size, len(features))
        order = list(LengthGroupedSampler([len(f["input_ids"]) for f in features], size, 0))
        batches = [collate([features[i] for i in order[k : k + size]]) for k in range(0, len(order) - size + 1, size)]
        hidden = any(t.needs_hidden_states for t in stage.transforms)
        dtype = autocast_dtype(stage.train.precision, device)
        start, tokens, warmup = 0.0, 0, 3
        for step in range(steps + warmup):
            if step == warmup:
                start, tokens = time.perf_counter(), 0
            batch = {name: value.to(device) for name, value in batches[step % len(batches)].items()}
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                outputs = model(**batch, output_hidden_states=hidden)
                terms = [outputs.loss * math.prod(t.task_weight(model) for t in stage.transforms)]
                for transform in stage.transforms:
                    terms += transform.loss(model, batch, outputs, context).values()
            torch.stack([t.float() for t in terms]).sum().backward()
            optimizer.step()
            for transform in stage.transforms:
                transform.after_step(model, step / (steps + warmup))
            optimizer.zero_grad()
            tokens += int(batch["attention_mask"].sum())
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rows.append(
            {
                "stage": stage.name,
                "step_ms": 1e3 * seconds / steps,
                "examples_per_second": steps * size / seconds,
                "tokens_per_second": tokens / seconds,
                "trainable": count(model)["trainable"],
                "peak_memory_mib": peak_memory() / 2**20,
            }
        )
    return rows


def ops(
    device: str | None, only: Sequence[str], quick: bool, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """The kernels' operators, checked against float64 and timed beside torch: (document, each one's rows to print).

    Args:
        device: "cpu" or "cuda"; None takes the GPU if there is one.
        only: names of operators; all if empty.
    """
    import torch
    from compressft_kernels.benchmark.run import measure, summary
    from compressft_kernels.dispatch import OPERATIONS

    for name in only:
        if name not in OPERATIONS:
            raise UserError(f"--only {name!r}: is no operator; there are {', '.join(OPERATIONS)}")
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {device!r}: wants cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    document = measure(only or OPERATIONS, chosen, quick=quick, say=say)
    return document, summary(document)
