"""What one training step minimises: the task's loss and what methods, objectives and passes add to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressft.run.mixed import FEED, Side
from compressft.tasks.task import IGNORE, Task
from compressft.transform import TASK_LOSS, Context, Transform


@dataclass(frozen=True)
class Asked:
    """Whose a batch is.

    Attributes:
        task: says what the model is given and what its loss is; None: the model's own head does.
        forward: what computes the outputs, where another head has to.
        feed: which of the stage's feeds; objectives that answer a task are for the first one's.
    """

    task: Task | None = None
    forward: nn.Module | None = None
    feed: int = 0


def loss_terms(
    model: nn.Module, batch: Mapping[str, Tensor], context: Context, asked: Asked = Asked()
) -> tuple[dict[str, Tensor], Any]:
    """The terms of a batch's loss by name, weighted, the task's own first; and the model's outputs.

    Args:
        context: the stage's; its Transforms add the terms.
    """
    transforms: Sequence[Transform] = context.transforms
    compute, task = asked.forward or model, asked.task
    acting = [t for t in transforms if not (asked.feed and t.answers)]
    given: dict[str, Any] = dict(batch if task is None else task.asked(batch))
    if any(t.needs_hidden_states for t in acting):
        given["output_hidden_states"] = True
    outputs: Any = compute(**given)
    loss, labels = outputs["loss"] if task is None else task.loss(outputs, batch), batch["labels"]
    if not labels.is_floating_point() and not labels.ne(IGNORE).any():
        # The mean over no label at all is not a number.
        loss = 0.0 * outputs["logits"].sum()
    name = f"{TASK_LOSS}.{asked.feed}" if asked.feed else TASK_LOSS
    terms = {name: loss * math.prod(t.task_weight(model) for t in acting)}
    for transform in acting:
        terms |= transform.loss(model, batch, outputs, context)
    return terms, outputs


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Their sum, in fp32."""
    return torch.stack([term.float() for term in terms.values()]).sum()


class Step(nn.Module):
    """The whole loss of a batch as one forward pass, which is what distributed training wraps.

    All that learns is inside: the model with its gates, the other feeds' heads, what objectives have learned.

    Attributes:
        terms: of the newest batch's loss.
    """

    def __init__(self, model: nn.Module, task: Task, sides: Sequence[Side], context: Context) -> None:
        super().__init__()
        self.model = model
        self.task = task
        # In a tuple: a view's head is a child of the model already, its backbone the model's.
        self.sides = tuple(sides)
        self.context = context
        self.terms: dict[str, Tensor] = {}

    def forward(self, batch: Mapping[str, Any], compute: nn.Module | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            compute: computes the first feed's outputs, where that is not the model itself.
        """
        given = dict(batch)
        feed = int(given.pop(FEED, 0))
        side = self.sides[feed - 1] if feed else None
        asked = Asked(side.task, side.view, feed) if side else Asked(self.task, compute)
        self.terms, _ = loss_terms(self.model, given, self.context, asked)
        return total(self.terms)
