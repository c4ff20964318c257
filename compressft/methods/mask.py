"""Mask-tuning: the pretrained weights stay what they are, and training decides which of them to leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.places import Part, head_linears, linear_paths, stacks
from compressft.model.surgery import compress_linear
from compressft.modules.gate import MaskGate, ScoreGate
from compressft.modules.linear import CompressedLinear
from compressft.modules.rank import keep_largest
from compressft.transform import Claim, Context, Resource, Transform

# A weight acts while its score is above this; new uniform scores start from -LOWEST (maskbert's constants).
THRESHOLD = 1e-2
LOWEST = 2e-2

Init = Literal["uniform", "magnitude"]
PRESETS: dict[str, dict[str, object]] = {
    "masking": {"parts": ("q", "k", "v", "o", "up", "down", "pooler"), "init": "uniform", "initial_sparsity": 0.05},
    "supermask": {"parts": ("q", "k", "v", "o"), "init": "magnitude", "initial_sparsity": 0.3, "first_layer": 0},
}


class Mask(Transform):
    """One bit per weight and task: W = W0 * 1[S > 0.01], S learned with dL/dS = dL/dW * W0.

    `masking` (Zhao et al., EMNLP 2020) masks the projections of the upper five sixths of the layers and the pooler;
    its scores start uniform. `supermask` (Radiya-Dixit & Wang, AISTATS 2020) leaves out a share of the smallest weights
    of selected projections, attention's by default, and goes on from there. Weights, biases, norms and embeddings stay
    frozen; a score far below the threshold still gets its gradient, so that a weight may return. `delta/` holds the
    masks, not the weights.

    Fields, each with the preset's value where it is not given: `parts` of the layers ("q", "k", "v", "o", "up", "down")
    and "pooler"; `first_layer` that is masked; `initial_sparsity`, the share that is left out at first; `init`:
    "uniform" draws scores from U(-0.02, s) with P(score <= 0.01) = initial_sparsity, "magnitude" sets exactly the
    smallest weights of each matrix to 0 and the others to 0.02, a few steps from the threshold. `head`: "trained" like
    any other method's (a few kilobytes a task, and logits of any scale), or "masked", the paper's: a random head that
    is only masked. `learning_rate` of the scores, which have no weight decay; it follows the stage's scheduler.
    """

    type: Literal["mask"] = "mask"
    preset: Literal["masking", "supermask"] = "masking"
    parts: tuple[Part, ...] | None = Field(default=None, min_length=1)
    first_layer: int | None = Field(default=None, ge=0)
    initial_sparsity: float | None = Field(default=None, ge=0, lt=1)
    init: Init | None = None
    head: Literal["trained", "masked"] = "trained"
    learning_rate: float = Field(default=1e-3, gt=0)

    def _set(self, field: str) -> Any:
        """A field's value, or the preset's."""
        value = getattr(self, field)
        return PRESETS[self.preset].get(field) if value is None else value

    def prepare(self, model: nn.Module, context: Context) -> None:
        depths, given = stacks(model), self._set("first_layer")
        if given is not None and given >= min(depths.values()):
            raise UserError(
                f"method.first_layer: {given} is no layer; the model has {min(depths.values())}, counted from 0"
            )
        first = {name: depth // 6 if given is None else given for name, depth in depths.items()}
        paths = linear_paths(model, self._set("parts"), first)
        if not paths:
            raise UserError(f"method.parts: {list(self._set('parts'))} names nothing that this model has; name more")
        Layers(top=0).prepare(model, context)
        for name in paths:
            # A pooler counts as a part of the head elsewhere.
            model.get_submodule(name).requires_grad_(False)
        if self.head == "masked":
            heads = head_linears(model)
            for name in heads:
                model.get_submodule(name).requires_grad_(False)
            paths += heads
        generator = torch.Generator().manual_seed(context.seed)
        for path in paths:
            linear = compress_linear(model, path)
            gate = ScoreGate(linear.out_features, linear.in_features)
            gate.scores.data = initial_scores(
                linear.weight, self._set("init"), self._set("initial_sparsity"), generator
            )
            gate.threshold.fill_(THRESHOLD)
            linear.gates[self.type] = gate.to(linear.weight.device)

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        # Decay pulls scores towards 0, below the threshold.
        scores = [gate.scores for _, gate in self._gated(model)]
        return [{"params": scores, "lr": self.learning_rate, "weight_decay": 0.0}]

    def _gated(self, model: nn.Module) -> list[tuple[CompressedLinear, ScoreGate]]:
        return [
            (module, module.gates[self.type])  # type: ignore[misc]
            for module in model.modules()
            if isinstance(module, CompressedLinear) and self.type in module.gates
        ]

    @torch.no_grad()
    def unfold(self, model: nn.Module, base: nn.Module) -> bool:
        """Masked weights become the base's own parameters again, under masks of one bit a weight.

        Many tasks share one base then, in memory as on disk. What is not the base's less some weights stays as it is,
        and so does a Conv1D, whose weight the product wants transposed.
        """
        plain = dict(base.named_modules())
        for path, module in list(model.named_modules()):
            old = getattr(plain.get(path), "weight", None)
            if not isinstance(module, nn.Linear) or getattr(module, "transposed", False) or old is None:
                continue
            new = module.weight
            if new is old or new.shape != old.shape:
                continue
            kept = (new != 0) | (old == 0)
            if torch.equal(new, old * kept):
                gate = MaskGate(*old.shape).to(old.device)
                gate.keep(kept)
                linear = compress_linear(model, path)
                linear.weight, linear.gates[self.type] = old, gate
        return bool(self._gated(model))

    def finalize(self, model: nn.Module) -> None:
        for linear, _ in self._gated(model):
            linear.fold(self.type)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        masks = [gate.mask for _, gate in self._gated(model)]
        now = 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        # Nothing is planned: what to leave out is what is learned.
        return {"masked": {"now": now, "planned": now, "target": now}}

    def check(self) -> str | None:
        if self._set("init") == "uniform" and self._set("initial_sparsity") == 0:
            return (
                "method.initial_sparsity: uniform scores need a share below the threshold; use magnitude or more than 0"
            )
        return None

    def takes(self) -> Sequence[Claim]:
        return (Claim(Resource.SCORES, "learns which weights to leave out", fix="prune in an earlier stage"),)


def initial_scores(weight: Tensor, init: Init, sparsity: float, generator: torch.Generator) -> Tensor:
    """First scores (out, in) fp32 of a weight, `sparsity` of them at or below the threshold.

    "uniform" draws from U(-c, s), s = (c + threshold) / sparsity - c, so that the share is a probability; "magnitude"
    gives exactly round(sparsity * N) of the smallest weights 0 and the others twice the threshold.
    """
    if weight.is_meta:
        # A model without values is there to be counted.
        return torch.empty(weight.shape)
    if init == "magnitude":
        number = weight.numel() - round(sparsity * weight.numel())
        return keep_largest([weight.detach().abs()], number)[0].float() * (2 * THRESHOLD)
    highest = (LOWEST + THRESHOLD) / sparsity - LOWEST
    return torch.empty(weight.shape).uniform_(-LOWEST, highest, generator=generator)
