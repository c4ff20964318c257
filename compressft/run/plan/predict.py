"""Predict a run's peak memory and time from its shapes, before anything is trained."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from compressft.errors import UserError
from compressft.export.measure import timed
from compressft.model.load import load_empty
from compressft.model.source import load_tokenizer
from compressft.recipe.program import Stage
from compressft.recipe.recipe import Recipe
from compressft.run.feed import load_feeds
from compressft.run.mixed import seen
from compressft.run.plan.footprint import export_bytes, parameters, saving_bytes, training_bytes
from compressft.tasks.encode import lengths_of
from compressft.transform import Context

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Share of the plain matrix product's speed that training reaches, evaluation and checkpoints included: 0.21 for a dense
# stage and 0.20 for one with distillation, pruning and int8, measured with MiniLM-L6 on two Zen 4 cores in bf16.
MATMUL_SHARE = 0.2


def parse_bytes(text: str) -> int:
    """ "8GiB" -> 8 * 2**30."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", text)
    if match is None:
        raise UserError(f"--memory {text!r}: wants a size such as 8GiB or 500MB")
    return int(float(match[1]) * UNITS[match[2] or ""])


@dataclass(frozen=True)
class Prediction:
    """Per stage: name, steps, bytes by part; the budget asked about; bytes by part of what follows the last stage."""

    stages: list[dict[str, Any]]
    budget: int | None
    after: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the process where it takes the most."""
        return max(sum(part.values()) for part in (*(stage["bytes"] for stage in self.stages), *self.after.values()))

    def lines(self) -> list[str]:
        """As printed."""
        result = []
        for stage in self.stages:
            result.append(
                f"{stage['name']}: {stage['steps']} steps, {stage['trainable']:,} trainable, {_bytes(stage['bytes'])}, "
                f"{stage['flops'] / 1e12:.1f} TFLOP, about {stage['seconds']:.0f} s here"
            )
        result += [f"{name}: {_bytes(part)}" for name, part in self.after.items()]
        result.append(f"peak: about {self.peak / 2**20:.0f} MiB")
        if self.budget is not None:
            trains = max(sum(stage["bytes"].values()) for stage in self.stages)
            cure = "lower train.batch_size or set train.gradient_checkpointing"
            if trains <= self.budget:
                cure = "training does; lower export.batch, or export elsewhere (export.enabled)"
            fits = "fits" if self.peak <= self.budget else f"does not fit; {cure}"
            result.append(f"budget {self.budget / 2**20:.0f} MiB: {fits}")
        return result


def _bytes(parts: Mapping[str, int]) -> str:
    said = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in parts.items() if value)
    return f"about {sum(parts.values()) / 2**20:.0f} MiB ({said})"


@cache
def matmul_rate(precision: str) -> float:
    """FLOP/s of a matrix product of a small encoder's shape in the training precision, on this machine, now."""
    from compressft.utils.precision import autocast_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = autocast_dtype(precision, device) or torch.float32
    a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((512, 768), (768, 768)))

    def call() -> None:
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()

    return 2 * 512 * 768 * 768 / (min(timed(call, budget=0.5)) / 1e3)


def plan(recipe: Recipe, memory: str | None = None) -> Prediction:
    """Build the model's shapes without its weights and count.

    Raises:
        UserError: recipe, data or `memory` is wrong.
    """
    budget = parse_bytes(memory) if memory else None
    tokenizer = load_tokenizer(recipe.model)
    feeds = load_feeds(recipe, tokenizer)
    stages, after = [], {}
    for stage in recipe.stages:
        rows = feeds.of(stage)
        model = load_empty(recipe.model, rows.task.auto_class, **rows.task.model_arguments())
        stages.append(_stage(stage, model, seen(feeds, stage)))
        after = _larger(after, saving_bytes(model, bool(stage.passes)))
    after = {"saving": after}
    if recipe.export.enabled:
        shipped = feeds.shipped
        model = load_empty(recipe.model, shipped.task.auto_class, **shipped.task.model_arguments())
        after["export"] = export_bytes(model, recipe.export, int(lengths_of(shipped.train, shipped.task).max()))
    return Prediction(stages, budget, after)


def _larger(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return max(one, other, key=lambda parts: sum(parts.values()))


def _stage(stage: Stage, model: Any, lengths: np.ndarray) -> dict[str, Any]:
    stage.method.prepare(model, Context(stage.transforms, {}, None, 0))
    trainable = parameters(model, trainable=True)
    examples = len(lengths)
    per_step = stage.train.batch_size * stage.train.gradient_accumulation
    steps = (
        stage.train.max_steps
        if stage.train.max_steps > 0
        else math.ceil(stage.train.epochs * math.ceil(examples / per_step))
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teachers = sum(1 for o in stage.objectives if getattr(o, "teacher", "self") not in ("self", "base"))
    matrix = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n)
    total_tokens = float(lengths.sum()) / examples * per_step * steps
    flops = total_tokens * matrix * (6 + 2 * teachers)
    seconds = flops / (matmul_rate(stage.train.precision) * MATMUL_SHARE)
    return {
        "name": stage.name,
        "steps": steps,
        "trainable": trainable,
        "bytes": training_bytes(model, stage, lengths, device),
        "flops": flops,
        "seconds": seconds,
    }
