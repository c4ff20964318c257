"""What the movement pruning passes share: scores next to the weights, thresholds that rise, and a penalty."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.modules.gate import ScoreGate, keep_top_each
from compressft.modules.linear import gates_of
from compressft.passes.shared.gradual import End, Schedule, Start, check_span, planned
from compressft.passes.shared.unstructured import LEARNED, SINGLE, fold_gates
from compressft.transform import WEIGHTS, Claim, Context, Transform

# The soft variant never leaves less of a tensor (Sanh, Wolf & Rush's code).
LEAST_KEPT = 0.005


class Scored(Transform):
    """Scores decide: the highest stay (`hard`), or those whose sigmoid is above a rising threshold (`soft`).

    Fields: `variant`; `sparsity` for hard; `threshold` (tau's final value) and `penalty` (lambda's) for soft;
    `learning_rate` of the scores; `freeze`, the progress from which on the masks stay. The others are those of
    `Excludes` and `Gradual`.
    """

    order: ClassVar[int] = WEIGHTS
    exclude: tuple[str, ...] = ()
    start: Start = 0.05
    end: End = 0.6
    schedule: Schedule = "cubic"
    variant: Literal["hard", "soft"] = "hard"
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    threshold: float = Field(default=0.1, gt=0, lt=0.5)
    penalty: float = Field(default=400.0, ge=0)
    learning_rate: float = Field(default=1e-2, gt=0)
    freeze: float = Field(default=0.8, gt=0, le=1)

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        scores = [gate.scores for _, gate in gates_of(model, self.type, ScoreGate)]
        return [{"params": scores, "lr": self.learning_rate, "weight_decay": 0.0}]

    def after_step(self, model: nn.Module, progress: float) -> None:
        learning = progress < self.freeze
        gates = [gate for _, gate in gates_of(model, self.type, ScoreGate)]
        # Masks that rest need no ranking; after a resume the scores are those that were ranked last.
        if gates[0].scores.requires_grad and progress > self.start:
            self.prune(model, planned(self, progress))
        for gate in gates:
            gate.scores.requires_grad_(learning)
            gate.weight_of_penalty = self.penalty * planned(self, progress) if self.variant == "soft" else 0.0

    @abstractmethod
    def pools(self, model: nn.Module) -> list[list[ScoreGate]]:
        """Gates whose scores compete with each other in the hard variant."""

    def prune(self, model: nn.Module, extent: float) -> None:
        """Set the gates' thresholds for a fraction of the full extent."""
        pools = self.pools(model)
        if self.variant == "hard":
            assert self.sparsity is not None
            kept = 1.0 - self.sparsity * extent
            keep_top_each(pools, [round(kept * sum(gate.scores.numel() for gate in gates)) for gates in pools])
        else:
            for gate in (gate for gates in pools for gate in gates):
                keep_above(gate, self.threshold * extent)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        if self.variant == "hard":
            return {}
        gates = [gate for _, gate in gates_of(model, self.type, ScoreGate)]
        weight = getattr(gates[0], "weight_of_penalty", 0.0)
        if weight == 0.0 or not gates[0].scores.requires_grad:
            return {}
        kept = torch.stack([torch.sigmoid(gate.scores).mean() for gate in gates]).mean()
        return {f"{self.type}.penalty": weight * kept}

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        extent = planned(self, progress)
        found: dict[str, dict[str, float]] = {}
        for name, now in self.shares(model).items():
            # The penalty decides what the soft variant removes: nothing is planned but its threshold.
            target = now if self.sparsity is None else self.sparsity
            found[name] = {"now": now, "planned": now if self.sparsity is None else target * extent, "target": target}
        if self.variant == "soft":
            tau = self.threshold * extent
            found["threshold"] = {"now": tau, "planned": tau, "target": self.threshold}
        return found

    @abstractmethod
    def shares(self, model: nn.Module) -> dict[str, float]:
        """What `status` shows as gone."""

    def finalize(self, model: nn.Module) -> None:
        fold_gates(model, self.type)

    def takes(self) -> Sequence[Claim]:
        return (SINGLE, LEARNED)

    def check(self) -> str | None:
        name = f"pass {self.type}"
        if self.variant == "hard" and self.sparsity is None:
            return f"{name}.sparsity: variant hard wants the fraction of weights to remove, such as 0.8"
        if self.variant == "soft" and self.sparsity is not None:
            return f"{name}.sparsity: variant soft gets its sparsity from {self.type}.penalty; remove it or use hard"
        if self.freeze < self.end:
            return f"{name}.freeze: {self.freeze} is before {self.type}.end {self.end}; the target would be missed"
        return check_span(self)


@torch.no_grad()
def keep_above(gate: ScoreGate, tau: float) -> None:
    """Let scores live whose sigmoid is above `tau`, and at least int(0.5 % of N) + 1 of them."""
    least = int(LEAST_KEPT * gate.scores.numel()) + 1
    gate.threshold.fill_(math.log(tau / (1.0 - tau)) if tau > 0 else -torch.inf)
    if int(gate.mask.sum()) < least:
        gate.keep_top(least)
