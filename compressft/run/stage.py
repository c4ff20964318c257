"""Train one stage, settle it, and check that settling changed nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from compressft.errors import Interrupted, UserError, VerificationError
from compressft.evaluation.logits import by_row, model_run
from compressft.model.anatomy import positions
from compressft.model.count import count, live_weights
from compressft.model.finite import refuse_update
from compressft.model.labels import reorder
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed
from compressft.model.shrink import shapes
from compressft.model.source import load_tokenizer
from compressft.model.surgery import checkpoint_activations
from compressft.recipe.parts import EVALUATION_BATCH
from compressft.recipe.program import Stage
from compressft.run.donors import add_sides, donor
from compressft.run.feed import Feeds
from compressft.run.records import Run, Spent
from compressft.run.share import shared_out
from compressft.run.stream import Stream
from compressft.tasks.task import Task
from compressft.transform import Context
from compressft.utils import ranks
from compressft.utils.collector import importing
from compressft.utils.machine import peak_memory
from compressft.utils.phases import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows, pieces of a vocabulary, and share of the logits' standard deviation, for the checks around finalize and save.
# One flipped int8 rounding moves a logit by about 1 %; a lost mask or range by more than all of it.
SETTLE_ROWS = 64
SETTLE_PIECES = 256
SETTLE_LIMIT = 0.1


def train_stage(run: Run, stage: Stage, model: nn.Module, feeds: Feeds, spent: Spent) -> dict[str, Any]:
    """Train one stage in place, from its newest checkpoint where there is one; returns its record."""
    with phase("loading"), importing():
        from transformers import set_seed

        from compressft.run.progress import Reporter
        from compressft.run.track import tracking
        from compressft.run.trainer import CompressionTrainer, Lesson

    folder, offset, rows = run.folder, spent.steps, feeds.of(stage)
    found = folder.newest(stage.name)
    checkpoint, manifest = found if found else (None, {"seconds": 0.0, "step": offset})
    begun = run.processes or manifest.get("processes", ranks.count())
    config = shared_out(stage.train, begun, ranks.count())
    set_seed(stage.train.seed)
    shapes_before = shapes(model)
    context = Context(
        stage.transforms,
        {},
        teacher_loader(run, rows.task, model),
        stage.train.seed,
        feeds.data(stage),
        lambda key, compute: folder.memo(f"{stage.name}.{key}", compute),
        # What one process has asked a teacher no other knows.
        folder=folder.root / "cache" / (f"process-{ranks.number()}" if ranks.number() else ""),
        **spent.costs,
    )
    with phase("loading"):
        rows_of_step = stage.train.batch_size * begun
        sides = add_sides(feeds, stage, model, lambda task: donor(run, feeds, stage, task), rows_of_step)
    with phase("search"):
        for transform in stage.transforms:
            transform.prepare(model, context)
    task = rows.task
    trainable = count(model)["trainable"]
    if not trainable:
        raise UserError(
            f"stages.{stage.name}.method: {stage.method.type} trains nothing of this model, whose output layer is no "
            "new task's head; take another method"
        )
    if stage.train.gradient_checkpointing:
        checkpoint_activations(model)
    done = manifest.get("done", False)
    folder.rewind(manifest["step"], evaluated=not done)
    reporter = Reporter(run, stage, task, offset, manifest["seconds"])
    train, validation = rows.features(stage)
    if rows.splits.stream is not None:
        train = Stream(rows.splits.stream, task, max(rows_of_step, config.batch_size), config.seed)
    lesson = Lesson(task, config, train, validation, sides, rows_of_step, tracking(run, stage))
    trainer = CompressionTrainer(model, lesson, context, folder.staging, [reporter])
    reporter.trainer = trainer
    if ranks.first():
        trainer.tokens, trainer.examples = manifest.get("tokens", 0), manifest.get("examples", 0)
    with closing(reporter):
        if checkpoint and done:
            trainer.restore(checkpoint)
        else:
            with phase("training"):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if reporter.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped at step {trainer.state.global_step} of stage {stage.name!r}; saved")
    refuse_update(model, trainer.state.global_step, stage.train.learning_rate, stage.train.weight_decay)
    differing = ranks.differing(model)
    if differing:
        raise RuntimeError(f"stage {stage.name!r}: {differing[0]} is not the same in all processes")
    sample = rows.validation[:SETTLE_ROWS]
    size = min(EVALUATION_BATCH, stage.train.eval_batch_size)
    masked, live = settled(model, task, sample, size), live_weights(model)
    for transform in stage.transforms:
        transform.finalize(model)
    if live_weights(model) > live:
        raise VerificationError(f"stage {stage.name!r}: finalize brought pruned weights back; the model is not saved")
    unchanged(f"stage {stage.name!r}: finalize", masked, settled(model, task, sample, size))
    model.zero_grad()
    seconds, steps = reporter.seconds, trainer.state.global_step
    return {
        "name": stage.name,
        "seconds": seconds,
        "steps": steps,
        "trainable": trainable,
        "examples": trainer.all_examples(),
        "examples_per_second": trainer.all_examples() / seconds,
        "tokens_per_second": trainer.all_tokens() / seconds,
        "peak_memory_bytes": peak_memory(),
        "validation": reporter.evaluations[-1] if reporter.evaluations else {},
        # A method may remove parts too.
        "dense": not stage.passes and shapes(model) == shapes_before,
    }


@phase("verification")
def settled(model: nn.Module, task: Task, sample: Sequence[Any], batch: int) -> list[np.ndarray]:
    """Logits per row for `unchanged`; of a vocabulary some of the pieces, the same for every token."""
    run = model_run(model, task)

    def some(rows: Sequence[Any]) -> np.ndarray:
        logits = run(rows)
        if logits.ndim < 3 or logits.shape[-1] <= SETTLE_PIECES:
            return logits
        # A copy: a view would keep all of them.
        return logits[..., :: math.ceil(logits.shape[-1] / SETTLE_PIECES)].copy()

    return by_row(some, task, sample, batch)


def unchanged(step: str, before: Sequence[Any], after: Sequence[Any]) -> None:
    """Compare per-row logits around a step that must not change them.

    Raises:
        VerificationError: they moved by more than rounding (`SETTLE_LIMIT` of their standard deviation).
    """
    error = max(float(np.abs(a - b).max()) for a, b in zip(before, after, strict=True))
    spread = max(float(np.concatenate([np.ravel(a) for a in before]).std()), 1e-6)
    if not error <= SETTLE_LIMIT * spread:
        raise VerificationError(
            f"{step} changed the logits by up to {error:.3g} (their standard deviation is {spread:.3g})"
        )


def refuse_reader(teacher: Any, name: str, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
    """Refuse a teacher to whom the student's token ids say other words.

    Raises:
        UserError: its tokenizer is another; or it has none, and its table another number of rows.
    """
    try:
        own = load_tokenizer(name).get_vocab()
    except UserError:
        if teacher.get_input_embeddings().num_embeddings >= len(tokenizer):
            return
        own = {}
    if any(own.get(piece) != number for piece, number in tokenizer.get_vocab().items()):
        raise UserError(f"{who} has another tokenizer, and would read other words; take a teacher of the same one")


def _fit_teacher(teacher: Any, name: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher who reads or answers otherwise than the student; bring its labels into the task's order.

    Args:
        tokenizer: the one that the student began with; what cuts it takes care of its teachers.
    """
    who = f"objective distill.teacher: {name!r}"
    labels = task.model_arguments().get("num_labels")
    if labels is not None and teacher.config.num_labels != labels:
        raise UserError(f"{who} has {teacher.config.num_labels} labels, the task has {labels}")
    if task.labels:
        reorder(teacher, task.labels, who)
    refuse_reader(teacher, name, tokenizer, who)
    places = positions(teacher)
    if places is not None and places < task.max_length:
        raise UserError(
            f"{who} has {places} positions, fewer than data.max_length; set that to {places}, or take another teacher"
        )


def teacher_loader(run: Run, task: Task, model: nn.Module) -> Callable[[str], nn.Module]:
    """Loads a teacher: a finished stage by name, else a folder or hub id trained for the same labels."""
    recipe, folder = run.recipe, run.folder

    def load(name: str) -> nn.Module:
        if any(stage.name == name for stage in recipe.stages):
            teacher: Any = load_compressed(folder.stage(name))
        else:
            teacher = load_model(name, task.auto_class, pad_token_id=task.tokenizer.pad_token_id)
            _fit_teacher(teacher, name, task, load_tokenizer(recipe.model))
        return teacher.to(next(model.parameters()).device)

    return load
