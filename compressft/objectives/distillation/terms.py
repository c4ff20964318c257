"""The terms of distillation, unweighted, from what student and teacher gave for one batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.model.anatomy import family_of
from compressft.model.embedder import gives_vectors
from compressft.modules.attention import Attended
from compressft.modules.pretrained import pretrained
from compressft.objectives.distillation import layer_map
from compressft.objectives.distillation.losses import (
    cosine_distance,
    kl_divergence,
    masked_mse,
    probability_kl,
    relation,
    score_mse,
    scores,
    visible,
)
from compressft.objectives.distillation.state import Distillation, Recorded
from compressft.objectives.distillation.teacher import Answer

if TYPE_CHECKING:
    from compressft.objectives.distill import Distill


class Outputs(Recorded, Protocol):
    """What the terms may want of a student's outputs."""

    logits: Tensor
    hidden_states: Sequence[Tensor]


def predicts_next(model: nn.Module, logits: Tensor) -> bool:
    """Whether a position's logits are about the next token (a causal language model) rather than its own."""
    if not family_of(model).causal or logits.dim() != 3:
        return False
    return logits.shape[-1] == pretrained(model).get_input_embeddings().get_parameter("weight").shape[0]


def logit_term(config: Distill, model: nn.Module, batch: Mapping[str, Tensor], ours: Tensor, theirs: Tensor) -> Tensor:
    """T^2 * KL of logits (B, C), or (B, T, C) at the positions that count; mean squared error of numbers (B, 1), mean
    squared distance of embeddings (B, d).

    Raises:
        UserError: the numbers of classes differ.
    """
    if ours.shape[-1] != theirs.shape[-1]:
        raise UserError(
            f"objective distill.logits: the student has {ours.shape[-1]} classes, teacher {config.teacher!r} has "
            f"{theirs.shape[-1]}; set it to 0 or take another teacher"
        )
    ours, theirs = ours.float(), theirs.float()
    if gives_vectors(model):
        # Reimers & Gurevych 2020 (arXiv:2004.09813, section 2): towards the teacher's vectors.
        return (ours - theirs).square().sum(-1).mean()
    if ours.shape[-1] == 1:
        return F.mse_loss(ours, theirs)
    if ours.dim() == 3:
        # Per-token logits: only positions that carry a label; all real tokens of a row that carries none.
        real = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
        keep = batch["labels"].ne(-100) if "labels" in batch else torch.zeros_like(real)
        keep = keep | (real & ~keep.any(1, keepdim=True))
        if predicts_next(model, ours):
            ours, theirs, keep = ours[:, :-1], theirs[:, :-1], keep[:, 1:]
        ours, theirs = ours[keep], theirs[keep]
    return kl_divergence(ours, theirs, config.temperature)


def intermediate_terms(
    config: Distill, state: Distillation, outputs: Outputs, answer: Answer, real: Tensor
) -> dict[str, Tensor]:
    """The terms on what is inside the models, by the name of their weight.

    Args:
        outputs: the student's, with `hidden_states` and `attended` where the terms want them.
        real: (B, T) boolean padding mask.
    """
    terms: dict[str, Tensor] = {}
    pairs = nearest(state, outputs, answer, real) if state.pairs is None else state.pairs
    if config.hidden > 0:
        terms["hidden"] = _mean(
            masked_mse(state.project(s, outputs.hidden_states[s]), answer.hidden[t], real[..., None]) for s, t in pairs
        )
    if config.cosine > 0:
        last, teachers_last = state.depths
        ours = state.project(last, outputs.hidden_states[last])
        terms["cosine"] = cosine_distance(ours, answer.hidden[teachers_last], real)
    if config.attention > 0:
        terms["attention"] = _mean(
            attention_term(config, outputs.attended[s], answer.attended[t], real) for s, t in pairs if min(s, t) > 0
        )
    if config.relations > 0:
        terms["relations"] = _mean(
            relation_term(outputs.attended[s], answer.attended[t], real, state.relation_heads)
            for s, t in state.relation_pairs
        )
    return terms


def _mean(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).mean()


def nearest(state: Distillation, outputs: Outputs, answer: Answer, real: Tensor) -> layer_map.Pairs:
    """The learned layer map for this batch."""
    with torch.no_grad():
        ours = [state.project(layer, hidden) for layer, hidden in enumerate(outputs.hidden_states)]
    return layer_map.learned(ours, [answer.hidden[layer] for layer in sorted(answer.hidden)], real)


def attention_term(config: Distill, ours: Attended, theirs: Attended, real: Tensor) -> Tensor:
    """Distance of one layer's attention scores or probabilities."""
    seen = visible(ours, real) & visible(theirs, real)
    student, teacher = scores(ours), scores(theirs)
    mean = config.attention_heads == "mean"
    if config.attention_kind == "probabilities":
        return probability_kl(student, teacher, seen, mean)
    if mean:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    return score_mse(student, teacher, seen)


def relation_term(ours: Attended, theirs: Attended, real: Tensor, heads: int) -> Tensor:
    """Mean over queries, keys and values of the KL of their relations with themselves (Wang et al. 2021, eq. 4)."""
    seen = visible(ours, real) & visible(theirs, real)
    return _mean(
        probability_kl(relation(getattr(ours, name), ours, heads), relation(getattr(theirs, name), theirs, heads), seen)
        for name in ("query", "key", "value")
    )
