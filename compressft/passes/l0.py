"""L0 regularisation: a hard-concrete gate per weight, closed by a penalty on the expected number of open ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.modules.l0 import L0Gate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.passes.shared.gradual import End, Schedule, Start, check_span, planned
from compressft.passes.shared.unstructured import LEARNED, SINGLE, fold_gates, gate_all, sparsity_now
from compressft.transform import WEIGHTS, Claim, Context, Transform


class L0(Transform):
    """Louizos, Welling & Kingma (2018) with the constants of Sanh, Wolf & Rush (2020).

    Every weight is multiplied by a gate drawn again in each forward pass; the loss gets lambda * mean over tensors of
    the mean probability that a gate is open, lambda rising to `penalty` along the schedule from `start` to `end`. How
    sparse the model becomes follows from `penalty`, the number of steps and `learning_rate`. From progress `freeze` on
    the gates take their deterministic values, which ship, and only the weights go on learning. Gates between 0 and 1
    are folded into the weights.

    Fields: `learning_rate` of the scores, which have no weight decay; it follows the stage's scheduler. `initial`: the
    scores' first value; at 2.197 a gate is open with probability 0.978.
    """

    type: Literal["l0"] = "l0"
    order: ClassVar[int] = WEIGHTS
    exclude: tuple[str, ...] = ()
    start: Start = 0.0
    end: End = 0.6
    schedule: Schedule = "constant"
    penalty: float = Field(default=125.0, ge=0)
    learning_rate: float = Field(default=0.1, gt=0)
    initial: float = 2.197
    freeze: float = Field(default=0.8, gt=0, le=1)

    def prepare(self, model: nn.Module, context: Context) -> None:
        def gate(path: str, linear: CompressedLinear) -> L0Gate:
            return L0Gate(linear.out_features, linear.in_features, self.initial)

        gate_all(model, self, gate)

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        scores = [gate.scores for _, gate in gates_of(model, self.type, L0Gate)]
        return [{"params": scores, "lr": self.learning_rate, "weight_decay": 0.0}]

    def after_step(self, model: nn.Module, progress: float) -> None:
        for _, gate in gates_of(model, self.type, L0Gate):
            gate.settle(progress >= self.freeze)
            gate.weight_of_penalty = self.penalty * planned(self, progress)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        gates = [gate for _, gate in gates_of(model, self.type, L0Gate)]
        weight = getattr(gates[0], "weight_of_penalty", 0.0)
        if weight == 0.0 or gates[0].settled:
            return {}
        return {"l0.penalty": weight * torch.stack([gate.open() for gate in gates]).mean()}

    def finalize(self, model: nn.Module) -> None:
        for _, gate in gates_of(model, self.type, L0Gate):
            gate.settle()
        fold_gates(model, self.type)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        # The penalty decides the sparsity; what is planned is the share of the penalty in force.
        now, share = sparsity_now(model, self.type), planned(self, progress)
        return {
            "sparsity": {"now": now, "planned": now, "target": now},
            "penalty": {"now": share, "planned": share, "target": 1.0},
        }

    def takes(self) -> Sequence[Claim]:
        return (SINGLE, LEARNED)

    def check(self) -> str | None:
        if self.freeze < self.end:
            return f"pass l0.freeze: {self.freeze} is before l0.end {self.end}; the penalty would not be reached"
        return check_span(self)
