"""Knowledge distillation: KL on logits and mean squared error on hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.anatomy import anatomy, family_of
from compressft.errors import UserError
from compressft.modules.linear import dense
from compressft.transform import OBJECTIVE, Context, Transform


class Distill(Transform):
    """Train towards a teacher (Hinton et al. 2015; hidden states as in TinyBERT, Jiao et al. 2020, equation 8).

    loss = task * CE + logits * T^2 * KL(softmax(z_t / T) || softmax(z_s / T)) + hidden * MSE(h_s, h_t), each mean over
    the rows (KL) or the real tokens and features (MSE); paddings do not count. Regression replaces KL by MSE.

    Fields: `teacher` is an earlier stage's name, a folder or hub id, or "self" (the same weights with gates and
    quantizers off, no second model). `layer_map` pairs student with teacher layers ([[1, 1], [2, 4]], 0 = embeddings);
    by default student layer i of L follows teacher layer round(i * L_t / L).
    """

    type: Literal["distill"] = "distill"
    order: ClassVar[int] = OBJECTIVE
    teacher: str
    temperature: float = Field(default=2.0, gt=0)
    task: float = Field(default=0.5, ge=0)
    logits: float = Field(default=0.5, ge=0)
    hidden: float = Field(default=0.0, ge=0)
    layer_map: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] | None = None

    @property
    def needs_hidden_states(self) -> bool:  # type: ignore[override]
        """Whether the student's forward must return its hidden states."""
        return self.hidden > 0

    @property
    def task_weight(self) -> float:
        return self.task

    def prepare(self, model: nn.Module, context: Context) -> None:
        if self.teacher == "self":
            return
        teacher = context.teacher(self.teacher)
        if self.hidden > 0:
            for student_layer, teacher_layer in self.pairs(model, teacher):
                depths = (len(anatomy(model).layers), len(anatomy(teacher).layers))
                if student_layer > depths[0] or teacher_layer > depths[1]:
                    raise UserError(
                        f"objective distill.layer_map: pair [{student_layer}, {teacher_layer}] is beyond the models' "
                        f"{depths[0]} and {depths[1]} layers"
                    )
            widths = [m.config.hidden_size for m in (model, teacher)]  # type: ignore[union-attr]
            if widths[0] != widths[1]:
                raise UserError(
                    f"objective distill.hidden: student width {widths[0]} and teacher width {widths[1]} differ; "
                    "set it to 0"
                )

    def pairs(self, student: nn.Module, teacher: nn.Module) -> list[tuple[int, int]]:
        """(student layer, teacher layer) pairs, 0 = embedding output."""
        if self.layer_map is not None:
            return list(self.layer_map)
        depth, teacher_depth = len(anatomy(student).layers), len(anatomy(teacher).layers)
        return [(i, round(i * teacher_depth / depth)) for i in range(depth + 1)]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], outputs: Any, context: Context) -> dict[str, Tensor]:
        teacher = model if self.teacher == "self" else context.teachers[self.teacher]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        target = _teach(teacher, inputs, self.hidden > 0, own_weights=self.teacher == "self")
        terms: dict[str, Tensor] = {}
        if self.logits > 0:
            terms["distill.logits"] = self.logits * self._logit_loss(
                batch, outputs.logits, target.logits, predicts_next(model, outputs.logits)
            )
        if self.hidden > 0:
            mask = batch["attention_mask"][..., None].bool()
            states = [(outputs.hidden_states[s], target.hidden_states[t]) for s, t in self.pairs(model, teacher)]
            errors = [_masked_mse(student, goal, mask) for student, goal in states]
            terms["distill.hidden"] = self.hidden * torch.stack(errors).mean()
        return terms

    def conflict(self, others: Sequence[Transform]) -> str | None:
        if self.hidden > 0 and any(other.type == "probe" for other in others):
            return "objective distill.hidden: method 'probe' keeps no hidden states to distil; set it to 0"
        return None

    def _logit_loss(self, batch: Mapping[str, Tensor], student: Tensor, teacher: Tensor, shifted: bool) -> Tensor:
        if student.shape[-1] == 1:
            return F.mse_loss(student.float(), teacher.float())
        student, teacher = student.float(), teacher.float()
        if student.dim() == 3:
            # Per-token logits: only positions that carry a label or a real token.
            keep = batch["labels"].ne(-100) if "labels" in batch else batch["attention_mask"].bool()
            if shifted:
                student, teacher, keep = student[:, :-1], teacher[:, :-1], keep[:, 1:]
            student, teacher = student[keep], teacher[keep]
        return kl_divergence(student, teacher, self.temperature)


def predicts_next(model: nn.Module, logits: Tensor) -> bool:
    """Whether a position's logits are about the next token (a causal language model) rather than its own."""
    if not family_of(model).causal or logits.dim() != 3:
        return False
    return logits.shape[-1] == model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over rows; logits (rows, classes) fp32."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def _masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    error = (student.float() - teacher.float()).square().masked_fill(~mask, 0.0)
    return error.sum() / (mask.sum() * student.shape[-1])


@torch.no_grad()
def _teach(teacher: nn.Module, inputs: dict[str, Tensor], hidden: bool, own_weights: bool) -> Any:
    if not own_weights:
        return teacher(**inputs, output_hidden_states=hidden)
    was_training = teacher.training
    teacher.eval()
    try:
        with dense():
            return teacher(**inputs, output_hidden_states=hidden)
    finally:
        teacher.train(was_training)
