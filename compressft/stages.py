"""Train the stages of a recipe one after the other, each resumable, each settled and checked before the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from compressft import ranks
from compressft.anatomy import positions
from compressft.checkpoint import load_compressed, save_compressed
from compressft.collector import importing
from compressft.costs import CostTable
from compressft.data import Splits, Task, make_task
from compressft.errors import Interrupted, UserError, VerificationError
from compressft.export.cache import has_cache
from compressft.export.flow import sample_batch
from compressft.export.refuse import refuse_attention, refuse_lengths, refuse_model
from compressft.export.session import by_row
from compressft.export.table import Deployment, measure_reference, measure_shapes, measure_table
from compressft.export.verify import model_run
from compressft.finite import refuse_update
from compressft.flops import FLOPS_LENGTH, flops
from compressft.folder import RunFolder
from compressft.foreign import load_config
from compressft.labels import reorder
from compressft.measure import peak_memory
from compressft.memory import give_back
from compressft.model import (
    answers_others,
    checkpoint_activations,
    count,
    live_weights,
    load_model,
    load_tokenizer,
    resolve,
)
from compressft.passes.int8 import Int8
from compressft.phases import SECONDS, keep, phase
from compressft.recipe import EVALUATION_BATCH, Recipe, Stage
from compressft.shrink import shapes
from compressft.target import Target
from compressft.transform import QUANTISES, Context, TrainingData

# Rows, pieces of a vocabulary, and share of the logits' standard deviation, for the checks around finalize and save.
# One flipped int8 rounding moves a logit by about 1 %; a lost mask or range by more than all of it.
SETTLE_ROWS = 64
SETTLE_PIECES = 256
SETTLE_LIMIT = 0.1
# Ratio of the slowest to the quietest round from which a cost table is doubtful.
BUSY = 1.2


def train_stages(
    recipe: Recipe, folder: RunFolder, task: Task, splits: Splits, info: dict[str, Any], console: Console
) -> tuple[nn.Module, Task, list[dict[str, Any]]]:
    """Train all stages one after the other, each from the weights of the one before.

    Args:
        info: recorded in each stage's model folder.

    Returns:
        the trained model on the CPU, the task with the tokenizer that it now has, and one record per stage.
    """
    with phase("loading"):
        model, rows, costs, base = start(recipe, folder, task, splits, console)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records: list[dict[str, Any]] = []
    for stage in recipe.stages:
        record = folder.finished(stage.name)
        if record is None:
            offset = sum(r["steps"] for r in records)
            record = train_stage(stage, model.to(device), recipe, folder, rows, offset, console, costs)
            record["base"] = base
            if ranks.first():
                save_compressed(model, rows.task.tokenizer, folder.stage(stage.name), {**info, "stage": record})
                keep(folder.root / SECONDS)
            ranks.wait()
        else:
            with phase("loading"):
                model = load_compressed(folder.stage(stage.name))
            tokenizer = load_tokenizer(str(folder.stage(stage.name)))
            if len(tokenizer) != len(rows.task.tokenizer):
                rows.retokenise(tokenizer)
        records.append(record)
        give_back()
    return model.cpu().eval(), rows.task, records


def start(
    recipe: Recipe, folder: RunFolder, task: Task, splits: Splits, console: Console
) -> tuple[Any, StageRows, dict[str, Any], dict[str, Any]]:
    """The model that training begins with, its rows, what parts of it cost, and what a report says of it.

    Raises:
        UserError: rows, recipe or disk do not go with it; nothing has been trained yet.
    """
    with importing():
        from transformers import set_seed

        # With the model's own module.
        set_seed(recipe.stages[0].train.seed)
        model = load_model(recipe.model, task.auto_class, new_head=True, **task.model_arguments())
    if answers_others(load_config(resolve(recipe.model)), task.model_arguments()):
        console.print(f"{recipe.model}: its head is for other labels; a new one is trained", soft_wrap=True)
    check_vocabulary(recipe.model, model, task.tokenizer)
    folder.check_space(sum(p.numel() * p.element_size() for p in model.parameters()))
    base = {"shapes": shapes(model), "parameters": count(model)["total"], "flops": flops(model, FLOPS_LENGTH)}
    rows = StageRows(task, splits)
    check_positions(recipe, model, rows)
    refuse_model(recipe, model)
    refuse_lengths(recipe, model, lambda: row_lengths(rows))
    refuse_attention(recipe, model, sample_batch(task, {"train": rows.train}))
    costs = known_costs(recipe, folder, model, rows, console)
    return model, rows, costs, base


def check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose pieces have no row in the model's table.

    Raises:
        UserError: it knows more than the model.
    """
    table = model.get_input_embeddings()
    if len(tokenizer) > table.num_embeddings:
        raise UserError(
            f"model: the tokenizer of {name!r} knows {len(tokenizer)} pieces, the model {table.num_embeddings}; "
            "resize its embeddings and save it again"
        )


@phase("loading")
def check_positions(recipe: Recipe, model: nn.Module, rows: StageRows) -> None:
    """Refuse rows, and shapes to measure, that are longer than the model's table of positions.

    Raises:
        UserError: what is too long, and for how many.
    """
    places = positions(model)
    if places is None:
        return
    longest = max(row_lengths(rows), default=0)
    if longest > places:
        raise UserError(
            f"data.max_length: a row has {longest} tokens, the model {places} positions; set it to {places} or less"
        )
    shape = max(recipe.export.latency_shapes, key=lambda shape: shape[1], default=(0, 0))
    if recipe.export.enabled and shape[1] > places:
        raise UserError(
            f"export.latency_shapes: {shape[0]}x{shape[1]} has more tokens than the model's {places} positions; "
            f"give shapes up to {places}, such as [[1, {places}]]"
        )


def row_lengths(rows: StageRows) -> list[int]:
    """Tokens of each row of all splits."""
    test = rows.task.encode(rows.splits.test) if rows.splits.test else []
    return [len(row["input_ids"]) for row in (*rows.train, *rows.validation, *rows.unlabelled, *test)]


class StageRows:
    """Training and validation rows as features, encoded anew where a pass changes the tokenizer."""

    def __init__(self, task: Task, splits: Splits) -> None:
        self.splits = splits
        self.task = task
        self._encode()

    @phase("loading")
    def _encode(self) -> None:
        self.train = self.task.encode(self.splits.train)
        self.unlabelled = self.task.encode_unlabelled(self.splits.unlabelled)
        self.validation = self.task.encode(self.splits.validation)

    def retokenise(self, tokenizer: Any) -> list[dict[str, Any]]:
        """Go on with another tokenizer; returns the training features."""
        self.task = make_task(self.task.type, tokenizer, self.task.max_length, self.task.labels)
        self._encode()
        return self.train

    def features(self, stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What this stage trains on, and validation; rows without labels where something answers for them."""
        taught = any(objective.answers for objective in stage.objectives)
        return self.train + (self.unlabelled if taught else []), self.validation

    def data(self) -> TrainingData:
        """What Transforms see of it."""
        return TrainingData(
            self.task.tokenizer,
            self.train,
            self.task.collate,
            self.retokenise,
            self.task.max_length,
            lambda: self.unlabelled,
        )


def train_stage(
    stage: Stage,
    model: nn.Module,
    recipe: Recipe,
    folder: RunFolder,
    rows: StageRows,
    offset: int,
    console: Console,
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """Train one stage in place, from its newest checkpoint where there is one; returns its record."""
    with phase("loading"), importing():
        from transformers import set_seed

        from compressft.progress import Reporter
        from compressft.trainer import CompressionTrainer

    set_seed(stage.train.seed)
    shapes_before = shapes(model)
    context = Context(
        stage.transforms,
        {},
        teacher_loader(recipe, folder, rows.task, model),
        stage.train.seed,
        rows.data(),
        lambda key, compute: folder.memo(f"{stage.name}.{key}", compute),
        # What one process has asked a teacher no other knows.
        folder=folder.root / "cache" / (f"process-{ranks.number()}" if ranks.number() else ""),
        **costs,
    )
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
    found = folder.newest(stage.name)
    checkpoint, manifest = found if found else (None, {"seconds": 0.0, "step": offset})
    processes = manifest.get("processes", ranks.count())
    if processes != ranks.count():
        raise UserError(
            f"--resume: the run was started with {processes} processes, this is one of {ranks.count()}; "
            f"go on with torchrun --nproc-per-node {processes}"
        )
    done = manifest.get("done", False)
    folder.rewind(manifest["step"], evaluated=not done)
    reporter = Reporter(folder, stage.name, task, stage.train.keep_checkpoints, offset, manifest["seconds"], console)
    trainer = CompressionTrainer(model, task, stage.train, context, *rows.features(stage), folder.staging, [reporter])
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


def known_costs(
    recipe: Recipe, folder: RunFolder, model: nn.Module, rows: StageRows, console: Console
) -> dict[str, Any]:
    """What `Context` says of costs: the uncompressed model's shapes, the shipped arithmetic, and measured tables.

    A table is measured when it is first asked for, once per run directory.
    """
    # Stages change the model in place: what the closure needs of it is taken now.
    architecture, config, options = type(model), copy.deepcopy(model.config), recipe.export
    quantisers = [p for stage in recipe.stages for p in stage.passes if p.order == QUANTISES]

    def deployment(precision: str) -> Deployment:
        int8 = next((p for p in reversed(quantisers) if isinstance(p, Int8)), Int8())
        return Deployment(
            architecture,
            config,
            sample_batch(rows.task, {"train": rows.train}),
            int8 if precision == "int8" else None,
            options.attention,
            options.threads,
            options.latency_rounds,
            has_cache(recipe),
        )

    def latency(target: Target, precision: str) -> CostTable:
        def compute() -> dict[str, Any]:
            console.print("measuring what heads and neurons cost on this machine", highlight=False)
            ships = deployment(precision)
            table = measure_table(ships, target.batch, target.length)
            reference = measure_reference(ships, target.batch, target.length, table.about["between_nodes"])
            rounds = table.about.get("rounds") or [1.0]
            if max(rounds) > BUSY * min(rounds):
                times = ", ".join(f"{ms:.2f}" for ms in rounds)
                console.print(
                    f"this machine is busy: the same model took {times} ms; milliseconds may be off, "
                    "shapes chosen by them too",
                    highlight=False,
                )
            return {**table.model_dump(mode="json"), "reference": reference}

        key = f"latency-{target.batch}x{target.length}-{precision}"
        return CostTable.model_validate(folder.memo(key, compute))

    def whole(target: Target, precision: str, layers: Sequence[Mapping[str, int]]) -> float:
        between = latency(target, precision).about["between_nodes"]
        return measure_shapes(deployment(precision), layers, target, between)

    ships = quantisers[-1].type if quantisers else "fp32"
    return {"base": shapes(model), "ships": ships, "latency": latency, "whole": whole}


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

    return by_row(some, sample, batch)


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


def refuse_reader(teacher: Any, name: str, tokenizer: Any, who: str) -> None:
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


def _fit_teacher(teacher: Any, name: str, task: Task, tokenizer: Any) -> None:
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


def teacher_loader(recipe: Recipe, folder: RunFolder, task: Task, model: nn.Module) -> Callable[[str], nn.Module]:
    """Loads a teacher: a finished stage by name, else a folder or hub id trained for the same labels."""

    def load(name: str) -> nn.Module:
        if any(stage.name == name for stage in recipe.stages):
            teacher: Any = load_compressed(folder.stage(name))
        else:
            teacher = load_model(name, task.auto_class, pad_token_id=task.tokenizer.pad_token_id)
            _fit_teacher(teacher, name, task, load_tokenizer(recipe.model))
        return teacher.to(next(model.parameters()).device)

    return load
