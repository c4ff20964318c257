"""What the passes share that compute masks from the weights, again and again while training runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.modules.gate import Gate, MaskGate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.passes.shared.gradual import End, Schedule, Start, check_span, planned
from compressft.passes.shared.unstructured import SINGLE, fold_gates, gate_all, present, sparsity_now
from compressft.transform import WEIGHTS, Claim, Context, Transform, ramp


class Masked(Transform):
    """Masks computed again from the weights at `updates` + 1 evenly spaced points from `start` to `end`, then kept.

    Between two updates and after the last one the masks stay as they are: training recovers what pruning cost.
    The fields are those of `Excludes` and `Gradual`.
    """

    order: ClassVar[int] = WEIGHTS
    exclude: tuple[str, ...] = ()
    start: Start = 0.05
    end: End = 0.6
    schedule: Schedule = "cubic"
    updates: int = Field(default=100, ge=1)

    @abstractmethod
    def choose(self, weights: list[Tensor], extent: float) -> list[Tensor]:
        """Bool masks (True is kept) for these weights (out, in) at a fraction of the full extent."""

    @property
    @abstractmethod
    def target(self) -> float:
        """Fraction of the weights that goes in the end."""

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        """A new gate, everything alive, for the layer at this path."""
        return MaskGate(linear.out_features, linear.in_features)

    def prepare(self, model: nn.Module, context: Context) -> None:
        gate_all(model, self, self.gate)

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        fraction = ramp(progress, self.start, self.end)
        # A point that rounding puts just behind its step still counts as reached.
        due = int(fraction * self.updates + 1e-9) + (fraction > 0)
        gated = gates_of(model, self.type, MaskGate)
        # The counter is state: a resumed run has the masks of the last update, whose weights are gone.
        if due > int(gated[0][1].updates):
            masks = self.choose([present(linear) for linear, _ in gated], planned(self, progress))
            for (_, gate), mask in zip(gated, masks, strict=True):
                gate.keep(mask)
                gate.updates.fill_(due)

    def finalize(self, model: nn.Module) -> None:
        fold_gates(model, self.type)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        now, due = sparsity_now(model, self.type), self.target * planned(self, progress)
        return {"sparsity": {"now": now, "planned": due, "target": self.target}}

    def takes(self) -> Sequence[Claim]:
        return (SINGLE,)

    def check(self) -> str | None:
        return check_span(self)
