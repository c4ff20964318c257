"""What `compressft benchmark` measures; works from an installed wheel."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressft.errors import UserError
from compressft.export.measure import Latency, Shape, latencies
from compressft.recipe.recipe import Recipe
from compressft.utils.machine import peak_memory

if TYPE_CHECKING:
    from compressft.recipe.program import Stage
    from compressft.run.feed import Feeds

# Steps before the clock starts: caches and the optimiser's state are made in them.
WARM_STEPS = 3


def parse_shape(text: str) -> Shape:
    """ "8x128" -> (8, 128)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise UserError(f"--shape {text!r}: wants BATCHxLENGTH, such as 1x128")
    return int(match[1]), int(match[2])


def edge(models: Sequence[Path], shapes: Sequence[str], threads: int | None, rounds: int) -> list[Latency]:
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


def training(recipe: Recipe, steps: int) -> list[dict[str, object]]:
    """Step time of every stage on its own rows, in the trainer of a run; teachers are the untrained model.

    Batches, accumulation, checkpointing, parameter groups and optimiser are the stage's own; nothing is evaluated,
    saved or settled.
    """
    from compressft.model.source import load_tokenizer
    from compressft.run.feed import load_feeds
    from compressft.utils.memory import keep_freed_memory
    from compressft.utils.quiet import quiet_libraries

    quiet_libraries()
    keep_freed_memory()
    feeds = load_feeds(recipe, load_tokenizer(recipe.model))
    return [_timed_stage(recipe, stage, feeds, steps) for stage in recipe.stages]


def _timed_stage(recipe: Recipe, stage: Stage, feeds: Feeds, steps: int) -> dict[str, object]:
    import torch
    from transformers import TrainerCallback, set_seed

    from compressft.model.count import count
    from compressft.model.surgery import checkpoint_activations
    from compressft.run.donors import add_sides, fresh
    from compressft.run.trainer import CompressionTrainer, Lesson
    from compressft.transform import Context

    device, rows = "cuda" if torch.cuda.is_available() else "cpu", feeds.of(stage)

    def untrained(name: str = "") -> Any:
        return fresh(recipe, rows.task, stage.train.seed).to(device)

    # Seconds, rows and tokens at the end of every step.
    seen: list[tuple[float, int, int]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            seen.append((time.perf_counter(), trainer.examples, trainer.tokens))

    model = untrained()
    sides = add_sides(feeds, stage, model, lambda task: fresh(recipe, task, stage.train.seed), stage.train.batch_size)
    set_seed(stage.train.seed)
    context = Context(stage.transforms, {}, untrained, stage.train.seed, feeds.data(stage))
    for transform in stage.transforms:
        transform.prepare(model, context)
    if stage.train.gradient_checkpointing:
        checkpoint_activations(model)
    config = stage.train.model_copy(update={"max_steps": steps + WARM_STEPS, "save": "no"})
    with tempfile.TemporaryDirectory(prefix="compressft-benchmark-") as scratch:
        lesson = Lesson(rows.task, config, *rows.features(stage), sides)
        trainer = CompressionTrainer(model, lesson, context, Path(scratch), [Clock()])
        trainer.args.eval_strategy = "no"  # type: ignore[assignment]
        trainer.train()
    (start, first_examples, first_tokens), (end, examples, tokens) = seen[WARM_STEPS - 1], seen[-1]
    return {
        "stage": stage.name,
        "step_ms": 1e3 * (end - start) / steps,
        "examples_per_second": (examples - first_examples) / (end - start),
        "tokens_per_second": (tokens - first_tokens) / (end - start),
        "trainable": count(model)["trainable"],
        "peak_memory_mib": peak_memory() / 2**20,
    }


def ops(
    device: str | None, only: Sequence[str], quick: bool, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], dict[str, list[dict[str, str]]]]:
    """The kernels' operators, checked against float64 and timed next to torch: (document, each one's rows to print).

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
