"""A student and its teacher: prepare a distillation and compute its terms on a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compressft.objectives.distill import Distill
from compressft.transform import Context


def prepared(objective: Distill, student: nn.Module, teacher: nn.Module | None = None, **more: Any) -> Context:
    """The context in which `teacher` is what any name loads."""
    context = Context(transforms=(objective,), load_teacher=lambda name: teacher, **more)
    objective.prepare(student, context)
    return context


def terms(objective: Distill, student: nn.Module, batch: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
    """The weighted terms of a forward with a graph."""
    outputs = student(**batch, output_hidden_states=objective.needs_hidden_states)
    return objective.loss(student, batch, outputs, context)


def asked(student: nn.Module, teacher: nn.Module | None, batch: dict[str, Tensor], **fields: Any) -> dict[str, Tensor]:
    """Prepare, compute the terms and leave the student again."""
    objective = Distill(**{"teacher": "t", "task": 0.0, "logits": 0.0, **fields})
    context = prepared(objective, student, teacher)
    try:
        return terms(objective, student, batch, context)
    finally:
        objective.finalize(student)
