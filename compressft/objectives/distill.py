"""Knowledge distillation: its fields and what it does when; `terms.py` says what is compared, `losses.py` how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from compressft.model.source import content_hash
from compressft.objectives.distillation.cache import AnswerCache
from compressft.objectives.distillation.compare import compare, recorded, wanted
from compressft.objectives.distillation.layer_map import Rule
from compressft.objectives.distillation.refuse import contradiction, wants
from compressft.objectives.distillation.state import NAME, Distillation
from compressft.objectives.distillation.teacher import OWN, Answer, ask, attention_modules, base_tensors, check_base
from compressft.objectives.distillation.terms import Outputs, intermediate_terms, logit_term
from compressft.transform import OBJECTIVE, Context, Transform, Want, without_labels


class Distill(Transform):
    """Train towards a teacher.

    loss = task * CE + logits * T^2 * KL(softmax(z_t / T) || softmax(z_s / T))     Hinton et al. 2015
         + hidden * MSE(W_h h_s, h_t) + attention * MSE(A_s, A_t)                  TinyBERT, Jiao et al. 2020, 7 and 8
         + cosine * (1 - cos(h_s, h_t)) of the last layers                         DistilBERT, Sanh et al. 2019
         + relations * mean over Q, K, V of KL(R_t || R_s)                         MiniLMv2, Wang et al. 2021

    Each is a mean over the rows (KL of logits), the real tokens and features (hidden), or the pairs of real tokens
    that attention lets see each other and the heads; several layers are averaged. Paddings do not count. Regression
    replaces the KL of logits by MSE.

    Fields:
        teacher: an earlier stage's name, a folder or hub id; "self": the same weights with gates and quantizers off;
            "base": the frozen base with deltas and adapters off too. The last two are no second model.
        layer_map: pairs of student and teacher layers ([[1, 1], [2, 4]], 0 = embeddings), or a rule: "uniform" (layer
            i of L follows round(i * L_t / L)), "last", "origin" (after passes `depth` and `ziplm`: the layer that it
            was), "learned" (the nearest in order, chosen again each step; `layer_map.learned`).
        projection: W_h where the widths differ: "shared" by all layers or one per "pair"; "none" where they are equal.
            The default is "shared" exactly where the widths differ.
        attention_kind: "scores" before softmax, or "probabilities" (their KL instead of the MSE).
        attention_heads: "each" head with its twin, or the "mean" over heads where their numbers differ.
        relation_heads: into how many heads queries, keys and values are cut; the teacher's own number by default.
        relation_map: pairs of layers for the relations; the last ones by default.
        intermediate_until: two phases (TinyBERT): up to this progress only the terms inside the models, from then on
            only task and logits. All together by default.
        cache: keep the teacher's answers in the run directory; the teacher runs once per example, not once per epoch.
        cache_precision: of the kept answers.
    """

    type: Literal["distill"] = "distill"
    order: ClassVar[int] = OBJECTIVE
    looks: ClassVar[bool] = False
    teacher: str
    temperature: float = Field(default=2.0, gt=0)
    task: float = Field(default=0.5, ge=0)
    logits: float = Field(default=0.5, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    cosine: float = Field(default=0.0, ge=0)
    attention: float = Field(default=0.0, ge=0)
    relations: float = Field(default=0.0, ge=0)
    layer_map: Rule | tuple[tuple[NonNegativeInt, NonNegativeInt], ...] | None = None
    projection: Literal["shared", "pair", "none"] | None = None
    attention_kind: Literal["scores", "probabilities"] = "scores"
    attention_heads: Literal["each", "mean"] = "each"
    relation_heads: int | None = Field(default=None, ge=1)
    relation_map: tuple[tuple[int, int], ...] | None = Field(default=None, min_length=1)
    intermediate_until: float | None = Field(default=None, gt=0, lt=1)
    cache: bool = False
    cache_precision: Literal["fp32", "fp16"] = "fp32"

    @property
    def answers(self) -> bool:  # type: ignore[override]
        """Whether rows without labels are taught: by logits or by what is inside."""
        return self.logits > 0 or self._looks_inside

    @property
    def needs_hidden_states(self) -> bool:  # type: ignore[override]
        """Whether the student's forward must return its hidden states."""
        return self.hidden > 0 or self.cosine > 0

    def task_weight(self, model: nn.Module) -> float:
        return self.task if Distillation.of(model).prediction else 0.0

    def prepare(self, model: nn.Module, context: Context) -> None:
        teacher = model if self.teacher in OWN else context.teacher(self.teacher)
        if self.teacher == "base":
            check_base(model, self.logits > 0)
        state = compare(self, model, teacher, context)
        model.add_module(NAME, state)
        self.after_step(model, 0.0)
        if self._records:
            state.asked = attention_modules(teacher, recorded(self, state, 1))
            state.record(model, attention_modules(model, recorded(self, state, 0)))

    def after_step(self, model: nn.Module, progress: float) -> None:
        if self.intermediate_until is not None:
            state = Distillation.of(model)
            state.intermediate = progress < self.intermediate_until
            state.prediction = not state.intermediate

    def finalize(self, model: nn.Module) -> None:
        Distillation.of(model).remove(model)

    def inputs(self) -> Sequence[str]:
        return () if self.teacher in OWN else (self.teacher,)

    def check(self) -> str | None:
        return contradiction(self)

    def wants(self) -> Sequence[Want]:
        return wants(self)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Outputs, context: Context
    ) -> dict[str, Tensor]:
        state = Distillation.of(model)
        answer = self._ask(model, state, without_labels(batch), context)
        terms: dict[str, Tensor] = {}
        if self.logits > 0 and state.prediction:
            assert answer.logits is not None
            terms["logits"] = logit_term(self, model, batch, outputs.logits, answer.logits)
        if state.intermediate and self._looks_inside:
            terms |= intermediate_terms(self, state, outputs, answer, batch["attention_mask"].bool())
        return {f"distill.{name}": getattr(self, name) * term for name, term in terms.items()}

    @property
    def _records(self) -> bool:
        return self.attention > 0 or self.relations > 0

    @property
    def _looks_inside(self) -> bool:
        return self.needs_hidden_states or self._records

    def _ask(self, model: nn.Module, state: Distillation, inputs: dict[str, Tensor], context: Context) -> Answer:
        teacher = model if self.teacher in OWN else context.teachers[self.teacher]
        layers = wanted(self, state)
        if self.cache:
            compute = partial(ask, teacher, self.teacher, hidden=layers, modules={})
            return self._cache(teacher, layers, context).answer(inputs, compute)
        inside = state.intermediate and self._looks_inside
        if not inside and not (self.logits > 0 and state.prediction):
            return Answer()
        return ask(teacher, self.teacher, inputs, layers if inside else set(), state.asked if inside else {})

    def _cache(self, teacher: nn.Module, layers: set[int], context: Context) -> AnswerCache:
        device = next(teacher.parameters()).device.type
        computes = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "fp32"
        name = f"distill.{self.teacher}.{computes}"
        if name not in context.opened:
            identity = content_hash(base_tensors(teacher) if self.teacher == "base" else teacher.state_dict())
            parts = [identity.removeprefix("sha256:")[:32], computes.removeprefix("torch."), self.cache_precision]
            folder = "-".join([*parts, *(str(layer) for layer in sorted(layers))])
            dtype = torch.float16 if self.cache_precision == "fp16" else torch.float32
            context.opened[name] = AnswerCache(context.folder / folder if context.folder else None, dtype)
        return context.opened[name]
