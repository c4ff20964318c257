"""Predict a run's peak memory and time from its shapes, before anything is trained."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from compressft.anatomy import anatomy, linear_shape
from compressft.errors import UserError
from compressft.measure import timed
from compressft.model import load_empty, load_tokenizer
from compressft.recipe import Recipe, Stage
from compressft.run import load_task
from compressft.transform import Context

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# Resident size of Python with torch and transformers loaded, and what fragmentation and checkpoint writing add to the
# rest: measured on Linux with MiniLM-L6 at batch 32 (predicted 1731 and 1941 MiB, measured 1797 and 2182 MiB for a
# dense stage and one with distillation, pruning and int8).
PROCESS_BYTES = 570 * 2**20
ALLOCATOR_SHARE = 0.25
# Tensors as large as a batch's logits that are there at once.
TRAINED_COPIES, EVALUATED_COPIES = 3, 2
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
    """Per stage: name, steps, bytes by part; and the budget asked about."""

    stages: list[dict[str, Any]]
    budget: int | None

    @property
    def peak(self) -> int:
        """Largest stage."""
        return max(sum(stage["bytes"].values()) for stage in self.stages)

    def lines(self) -> list[str]:
        """As printed."""
        result = []
        for stage in self.stages:
            parts = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in stage["bytes"].items())
            total = sum(stage["bytes"].values())
            result.append(
                f"{stage['name']}: {stage['steps']} steps, {stage['trainable']:,} trainable, "
                f"about {total / 2**20:.0f} MiB ({parts}), "
                f"{stage['flops'] / 1e12:.1f} TFLOP, about {stage['seconds']:.0f} s here"
            )
        result.append(f"peak: about {self.peak / 2**20:.0f} MiB")
        if self.budget is not None:
            fits = (
                "fits"
                if self.peak <= self.budget
                else "does not fit; lower train.batch_size or set train.gradient_checkpointing"
            )
            result.append(f"budget {self.budget / 2**20:.0f} MiB: {fits}")
        return result


@cache
def matmul_rate(precision: str) -> float:
    """FLOP/s of a matrix product of a small encoder's shape in the training precision, on this machine, now."""
    from compressft.precision import autocast_dtype

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
    task, splits = load_task(recipe, tokenizer)
    lengths = [len(feature["input_ids"]) for feature in task.encode(splits.train)]
    more = [len(feature["input_ids"]) for feature in task.encode_unlabelled(splits.unlabelled)]
    arguments = task.model_arguments()
    stages = []
    for stage in recipe.stages:
        taught = more if any(objective.answers for objective in stage.objectives) else []
        stages.append(_stage(stage, load_empty(recipe.model, task.auto_class, **arguments), lengths + taught))
    return Prediction(stages, budget)


def _stage(stage: Stage, model: Any, lengths: list[int]) -> dict[str, Any]:
    parameters = count_meta(model)
    stage.method.prepare(model, Context(stage.transforms, {}, None, 0))
    trainable = count_meta(model, trainable=True)
    examples = len(lengths)
    per_step = stage.train.batch_size * stage.train.gradient_accumulation
    steps = (
        stage.train.max_steps
        if stage.train.max_steps > 0
        else math.ceil(stage.train.epochs * math.ceil(examples / per_step))
    )
    longest = max(lengths)
    tokens = stage.train.batch_size * longest
    teachers = sum(1 for o in stage.objectives if getattr(o, "teacher", "self") not in ("self", "base"))
    moments = {"adamw_8bit": 2, "paged_adamw_8bit": 2}.get(stage.train.optimizer, 8)
    bytes_ = {
        "weights": 4 * parameters * (1 + teachers),
        "gradients": 4 * trainable,
        "optimiser": moments * trainable,
        "activations": activation_bytes(model, tokens, stage),
        "logits": logits_bytes(model, longest, stage),
        "process": PROCESS_BYTES,
    }
    bytes_["allocator"] = int(ALLOCATOR_SHARE * sum(bytes_.values()))
    matrix = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n)
    total_tokens = sum(lengths) / examples * per_step * steps
    flops = total_tokens * matrix * (6 + 2 * teachers)
    seconds = flops / (matmul_rate(stage.train.precision) * MATMUL_SHARE)
    return {
        "name": stage.name,
        "steps": steps,
        "trainable": trainable,
        "bytes": bytes_,
        "flops": flops,
        "seconds": seconds,
    }


def count_meta(model: Any, trainable: bool = False) -> int:
    """Parameters of a model without data."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def activation_bytes(model: Any, tokens: int, stage: Stage) -> int:
    """What one batch keeps for the backward pass.

    Per token and layer: inputs of the projections, norms and residuals (about 14 values of the hidden width, 3 of the
    FFN's, four bytes each: under autocast the halved tensors are kept beside their fp32 sources); with checkpointing
    one hidden state per layer and one layer in full. int8 training keeps two more bytes per projection input.
    """
    parts = anatomy(model)
    hidden = parts.width
    quantised = any(p.type == "int8" for p in stage.passes)
    layers = [
        4 * (14 * hidden + 3 * layer.ffn) + (2 * (5 * hidden + layer.ffn) if quantised else 0) for layer in parts.layers
    ]
    if stage.train.gradient_checkpointing:
        return tokens * (max(layers) + 4 * len(layers) * hidden)
    trained = [size for layer, size in zip(parts.layers, layers, strict=True) if _has_graph(parts, layer.index)]
    return tokens * (sum(trained) if trained else max(layers))


def logits_bytes(model: Any, longest: int, stage: Stage) -> int:
    """A vocabulary's logits: those of the training batch, or of the evaluation batch where that takes more.

    In training the loss keeps its log-probabilities beside them, and both have a gradient for a while; in evaluation
    there are the logits and the log-probabilities.
    """
    head = model.get_output_embeddings()
    if head is None:
        return 0
    rows = max(TRAINED_COPIES * stage.train.batch_size, EVALUATED_COPIES * stage.train.eval_batch_size)
    return 4 * linear_shape(head)[1] * longest * rows


def _has_graph(parts: Any, index: int) -> bool:
    embeddings = any(
        p.requires_grad for path in parts.family.embeddings for p in parts.backbone.get_submodule(path).parameters()
    )
    return embeddings or any(p.requires_grad for layer in parts.layers[: index + 1] for p in layer.module.parameters())
