"""How many bytes a process takes in each part of a run, from shapes alone.

The figures below were measured on Linux with MiniLM-L6 (fully trained, with LoRA, pruned by ziplm) and two small
language models, one command each; the process keeps what it freed inside a part and gives it back between parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from compressft.model.anatomy import Anatomy, Layer, anatomy, linear_shape
from compressft.modules.dense_attention import MOST_SCORES
from compressft.recipe.parts import ExportConfig
from compressft.recipe.program import Stage
from compressft.utils.precision import autocast_dtype

MIB = 2**20
# Resident bytes of Python with torch and transformers loaded: while training, while saving, and with the exporter and
# onnxruntime too.
TRAINING_PROCESS, SAVING_PROCESS, EXPORT_PROCESS = 625 * MIB, 690 * MIB, 870 * MIB
# What lies between tensors, as a share of theirs; of activations whose sizes change from batch to batch, so that they
# rarely fit where the last batch's were.
ALLOCATOR_SHARE, VARIED_SHARE = 0.05, 0.5
# Tensors as large as a batch's logits that are there at once: in training logits, log-probabilities and a gradient; in
# evaluation logits, log-probabilities and a row's own.
LOGITS_COPIES = 3
# delta/: the model, its base and the state that is compared; places and values of the largest changed matrix.
DELTA_COPIES, DELTA_PARTS = 3, 9
# Export: the model folded, the exporter's copy, the file's message and bytes. Verification: the model, two sessions.
EXPORT_COPIES, VERIFIED_COPIES = 7, 4
# Bytes per attention score: the softmax, dropout's byte and what it left; and what one layer has besides.
SCORE_BYTES, PASSING_SCORE_BYTES = 9, 10
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


def parameters(model: nn.Module, trainable: bool = False) -> int:
    """Parameters of a model without data."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def training_bytes(model: nn.Module, stage: Stage, lengths: Sequence[int] | np.ndarray, device: str) -> dict[str, int]:
    """Peak of a stage by what takes it.

    Args:
        model: without data, prepared by the stage's method.
        lengths: tokens of each row, (rows,).
    """
    longest = int(np.max(lengths))
    trainable = parameters(model, trainable=True)
    teachers = sum(1 for o in stage.objectives if getattr(o, "teacher", "self") not in ("self", "base"))
    moments = {"adamw_8bit": 2, "paged_adamw_8bit": 2}.get(stage.train.optimizer, 8)
    found = {
        "weights": 4 * parameters(model) * (1 + teachers),
        "gradients": 4 * trainable,
        "optimiser": moments * trainable,
        "activations": activation_bytes(model, longest, stage, device),
        "logits": logits_bytes(model, longest, stage),
    }
    # Before there are gradients; what is more than those counts.
    calibration = calibration_bytes(model, stage)
    found["calibration"] = max(calibration - sum(found.values()) + found["weights"], 0)
    share = VARIED_SHARE if device == "cpu" and np.min(lengths) < longest else ALLOCATOR_SHARE
    found["allocator"] = int(ALLOCATOR_SHARE * sum(found.values()) + (share - ALLOCATOR_SHARE) * found["activations"])
    return {**found, "process": TRAINING_PROCESS}


def saving_bytes(model: nn.Module, trained: bool) -> dict[str, int]:
    """Peak while model/ and delta/ are written.

    Args:
        model: the base, without data, prepared by the method that changes the most of it.
        trained: whether matrices change without being trained, as what is removed from them does.
    """
    matrices = [p.numel() for p in model.parameters() if p.dim() == 2 and (trained or p.requires_grad)]
    return {
        "weights": DELTA_COPIES * 4 * parameters(model),
        "delta": DELTA_PARTS * 4 * max(matrices, default=0),
        "process": SAVING_PROCESS,
    }


def export_bytes(model: nn.Module, options: ExportConfig, longest: int) -> dict[str, int]:
    """Peak of export and verification: the base's file is written too, whatever is left of the model."""
    weights = 4 * parameters(model)
    logits = LOGITS_COPIES * 4 * _vocabulary(model) * longest * options.batch
    verified = VERIFIED_COPIES * weights + logits + _passing_bytes(anatomy(model), longest * options.batch)
    written = EXPORT_COPIES * weights
    if written >= verified:
        return {"weights": written, "process": EXPORT_PROCESS}
    return {"weights": VERIFIED_COPIES * weights, "logits": verified - VERIFIED_COPIES * weights,
            "process": EXPORT_PROCESS}  # fmt: skip


def activation_bytes(model: nn.Module, longest: int, stage: Stage, device: str) -> int:
    """What one batch keeps for the backward pass, or one evaluation batch passes on where that takes more.

    Per token and layer: inputs of the projections, norms and residuals (about 10 values of the hidden width, 3 of the
    FFN's and 5 where it is gated, four bytes each: under autocast the halved tensors are kept next to their fp32
    sources), and the attention's scores where they are written down; with checkpointing one hidden state per layer and
    one layer in full. int8 training keeps two more bytes per projection input.
    """
    parts = anatomy(model)
    hidden, tokens = parts.width, stage.train.batch_size * longest
    quantised = any(p.type == "int8" for p in stage.passes)
    written = _writes_scores(model, parts.layers[0], stage, longest, device)

    def kept(layer: Layer) -> int:
        inputs = 2 * (5 * hidden + layer.ffn) if quantised else 0
        scores = SCORE_BYTES * layer.heads * longest * written
        return 4 * (10 * hidden + (1 + 2 * len(layer.family.up)) * layer.ffn) + inputs + scores

    layers = [kept(layer) for layer in parts.layers]
    passing = PASSING_SCORE_BYTES * parts.layers[0].heads * longest * written
    evaluated = _passing_bytes(parts, stage.train.eval_batch_size * longest)
    if stage.train.gradient_checkpointing:
        return max(tokens * (max(layers) + passing + 4 * len(layers) * hidden), evaluated)
    trained = [size for layer, size in zip(parts.layers, layers, strict=True) if _has_graph(parts, layer.index)]
    return max(tokens * (sum(trained) + passing if trained else max(layers)), evaluated)


def logits_bytes(model: nn.Module, longest: int, stage: Stage) -> int:
    """A vocabulary's logits, of the training or the evaluation batch, whichever is larger."""
    rows = max(stage.train.batch_size, stage.train.eval_batch_size)
    return LOGITS_COPIES * 4 * _vocabulary(model) * longest * rows


def calibration_bytes(model: nn.Module, stage: Stage) -> int:
    """What `ziplm` has of every layer at once: second moments (fp32, then doubles), weights in doubles, an inverse."""
    if not any(p.type == "ziplm" for p in stage.passes):
        return 0
    parts = anatomy(model)
    sizes = [(layer.heads * layer.head_dim, layer.ffn) for layer in parts.layers]
    moments = sum(o * o + f * f for o, f in sizes)
    weights = sum(parts.width * (o + f) for o, f in sizes)
    return 12 * moments + 8 * weights + 24 * max(f * f for _, f in sizes)


def _vocabulary(model: Any) -> int:
    """Width of a language model's logits; 0 where there is one answer a row or a few a token."""
    head = model.get_output_embeddings()
    return 0 if head is None else linear_shape(head)[1]


def _passing_bytes(parts: Anatomy, tokens: int) -> int:
    """What one layer has at once without gradients."""
    return 4 * tokens * (6 * parts.width + 2 * max(layer.ffn for layer in parts.layers))


def _writes_scores(model: Any, layer: Layer, stage: Stage, longest: int, device: str) -> bool:
    """Whether `modules.dense_attention` takes over in training."""
    if device != "cpu":
        return False
    if any(getattr(model.config, name, None) for name in DROPOUTS):
        return True
    scores = stage.train.batch_size * layer.heads * longest**2
    return autocast_dtype(stage.train.precision, device) is not None and scores <= MOST_SCORES


def _has_graph(parts: Anatomy, index: int) -> bool:
    embeddings = any(
        p.requires_grad for path in parts.family.embeddings for p in parts.backbone.get_submodule(path).parameters()
    )
    return embeddings or any(p.requires_grad for layer in parts.layers[: index + 1] for p in layer.module.parameters())
