"""What distillation decides before training: which layers are compared, in which heads, through which projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import Layer, anatomy, linear_shape, refuse_pairs
from compressft.objectives.distillation import layer_map
from compressft.objectives.distillation.state import Distillation
from compressft.transform import Context

if TYPE_CHECKING:
    from compressft.objectives.distill import Distill


def compare(config: Distill, model: nn.Module, teacher: nn.Module, context: Context) -> Distillation:
    """Everything that a step of distillation needs to know of the two models.

    Raises:
        UserError: the models do not fit to each other as the configuration says.
    """
    if config.needs_hidden_states or config.attention > 0 or config.relations > 0:
        refuse_pairs(model, "objective distill.hidden, attention, cosine and relations")
    state = Distillation()
    layers, theirs = anatomy(model).layers, anatomy(teacher).layers
    state.depths = (len(layers), len(theirs))
    state.pairs = _pairs(config, state.depths, context)
    if state.pairs is not None:
        layer_map.check(state.pairs, *state.depths)
    if config.attention > 0 and config.attention_heads == "each":
        _check_heads(state, layers, theirs)
    if config.relations > 0:
        _cut_relations(config, state, layers, theirs)
    if config.needs_hidden_states:
        widths = _width(layers[0]), _width(theirs[0])
        _widen(config, state, widths, context.seed, next(model.parameters()).device)
    return state


def recorded(config: Distill, state: Distillation, side: int) -> set[int]:
    """Layers whose attention is wanted, of the student (side 0) or the teacher (1)."""
    layers = {pair[side] for pair in state.relation_pairs}
    if config.attention > 0:
        everything = set(range(1, state.depths[side] + 1))
        layers |= everything if state.pairs is None else {p[side] for p in state.pairs if min(p) > 0}
    return layers


def wanted(config: Distill, state: Distillation) -> set[int]:
    """Layers whose hidden states the teacher must give."""
    layers: set[int] = set()
    if config.hidden > 0:
        layers |= set(range(state.depths[1] + 1)) if state.pairs is None else {t for _, t in state.pairs}
    if config.cosine > 0:
        layers.add(state.depths[1])
    return layers


def _width(layer: Layer) -> int:
    return linear_shape(layer.part(layer.family.o))[1]


def _pairs(config: Distill, depths: tuple[int, int], context: Context) -> layer_map.Pairs | None:
    rule = config.layer_map
    if rule == "learned":
        return None
    if rule == "last":
        return (depths,)
    if rule == "origin":
        kept = list(range(depths[1]))
        for one in sorted(context.transforms, key=lambda one: one.order):
            kept = [kept[i] for i in one.kept(len(kept), context)]
        return layer_map.origin(kept, *depths)
    if rule is None or rule == "uniform":
        return layer_map.uniform(*depths)
    return rule


def _widen(config: Distill, state: Distillation, widths: tuple[int, int], seed: int, device: torch.device) -> None:
    kind = config.projection or ("none" if widths[0] == widths[1] else "shared")
    if kind == "none" and widths[0] != widths[1]:
        raise UserError(
            f"objective distill.projection: student width {widths[0]} and teacher width {widths[1]} differ; "
            "use shared or pair, or set hidden and cosine to 0"
        )
    layers: set[int] = set()
    if config.hidden > 0:
        layers |= set(range(state.depths[0] + 1)) if state.pairs is None else {s for s, _ in state.pairs}
    if config.cosine > 0:
        layers.add(state.depths[0])
    state.widen(kind, sorted(layers), widths, seed, device)


def _check_heads(state: Distillation, layers: tuple[Layer, ...], theirs: tuple[Layer, ...]) -> None:
    every = [(s, t) for s in range(1, len(layers) + 1) for t in range(1, len(theirs) + 1)]
    for s, t in every if state.pairs is None else state.pairs:
        if min(s, t) > 0 and layers[s - 1].heads != theirs[t - 1].heads:
            raise UserError(
                f"objective distill.attention: student layer {s} has {layers[s - 1].heads} heads, teacher layer "
                f"{t} has {theirs[t - 1].heads}; set attention_heads to mean, or use relations"
            )


def _cut_relations(config: Distill, state: Distillation, layers: tuple[Layer, ...], theirs: tuple[Layer, ...]) -> None:
    state.relation_pairs = config.relation_map or (state.depths,)
    state.relation_heads = config.relation_heads or theirs[-1].heads
    for s, t in state.relation_pairs:
        if not (1 <= s <= len(layers) and 1 <= t <= len(theirs)):
            raise UserError(
                f"objective distill.relation_map: pair [{s}, {t}] is not among layers 1 to {len(layers)} and "
                f"1 to {len(theirs)}"
            )
        for who, layer in (("student", layers[s - 1]), ("teacher", theirs[t - 1])):
            if layer.heads * layer.head_dim % state.relation_heads:
                raise UserError(
                    f"objective distill.relation_heads: {state.relation_heads} does not divide the {who}'s "
                    f"{layer.heads} * {layer.head_dim} attention features; give a number that divides both models'"
                )
