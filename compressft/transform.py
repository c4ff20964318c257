"""The one concept: a Transform rewrites a model before training, may follow training, and settles it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn

TASK_LOSS = "task"


@dataclass
class Context:
    """What a Transform may know of the run besides the model.

    Attributes:
        transforms: all Transforms of the stage, the method first.
        teachers: finished earlier stages by name, dense models in eval mode.
        load_teacher: loads a model from a folder or hub id, ready for this task.
        seed: the stage's seed; a Transform that draws numbers makes its own generator from it.
    """

    transforms: Sequence[Transform] = ()
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    load_teacher: Any = None
    seed: int = 0


class Transform(BaseModel):
    """Base of every method, objective and pass: its own configuration (the fields a recipe may set) plus five hooks.

    Instances are frozen: all tensor state lives in the model as parameters and buffers, so the checkpoint is the state
    dict. `after_step` is also called once before the first step (with the starting progress and no gradients), which
    makes everything that depends on progress right after a resume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: str
    needs_hidden_states: ClassVar[bool] = False

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Rewrite the model before training. Raises UserError where the model lacks what this needs."""

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, Any]]:
        """Optimiser groups (`params`, `lr`, ...) for parameters that must not take the stage's settings."""
        return []

    def loss(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], outputs: Any, context: Context
    ) -> dict[str, torch.Tensor]:
        """Further loss terms by name, already weighted; scalars."""
        return {}

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Follow training: called after each optimiser step, gradients still there. `progress` is in [0, 1]."""

    def finalize(self, model: nn.Module) -> None:
        """Settle the model after training: from here on it is what ships."""

    @property
    def task_weight(self) -> float:
        """Factor on the task's own loss; the factors of all objectives multiply."""
        return 1.0

    def conflict(self, others: Sequence[Transform]) -> str | None:
        """Why this cannot run beside `others` (with the fix), or None."""
        return None

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        """What the progress display shows: {quantity: {"now", "planned", "target"}}."""
        return {}


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that require a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
