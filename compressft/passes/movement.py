"""Movement pruning: learned scores decide which weights go, and weights that move away from 0 gain score."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from compressft.modules.gate import ScoreGate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.passes.shared.scored import Scored
from compressft.passes.shared.unstructured import gate_all, present, sparsity_now
from compressft.transform import Context


class Movement(Scored):
    """Train a score S per weight with dL/dS = dL/dW' * W, next to the weights (Sanh, Wolf & Rush 2020).

    `hard`: the highest scores stay, exactly round((1 - sparsity) * N) once the schedule is at its end: of all layers
    together (`scope` "global", hard's default) or of each layer ("layer", as in the paper, and soft's only one).
    `soft`: weights stay while sigmoid(S) > tau, with tau on its way from 0 to `threshold`, under the penalty
    lambda * mean over tensors of mean(sigmoid(S)), lambda = `penalty` * tau / `threshold`; at least 0.5 % of a tensor
    stays. How sparse the soft variant becomes follows from `penalty` (and the number of steps times `learning_rate`),
    so it takes no `sparsity`: use hard for a target.

    Fields: `learning_rate` of the scores, which have no weight decay; it follows the stage's scheduler. Pruned weights
    keep getting score gradients and may return until progress `freeze`; from there on masks stay. `initial`: scores
    start at "zero" (soft's default, and the paper's) or at the "magnitude" |weight| (hard's default), shifted and
    scaled to mean 0 and standard deviation 1 over what competes (a layer or all): what training does not move is then
    ranked by its magnitude. From 0, the first weights to go are no small ones, and runs of a few epochs may not recover
    from that (`benchmarks/results/compression.md`). The paper's hard form is `initial: zero, scope: layer`.
    """

    type: Literal["movement"] = "movement"
    initial: Literal["zero", "magnitude"] | None = None
    scope: Literal["global", "layer"] | None = None

    @torch.no_grad()
    def prepare(self, model: nn.Module, context: Context) -> None:
        def gate(path: str, linear: CompressedLinear) -> ScoreGate:
            return ScoreGate(linear.out_features, linear.in_features)

        gate_all(model, self, gate)
        if (self.initial or ("magnitude" if self.variant == "hard" else "zero")) == "zero":
            return
        sizes = {gate: present(linear).abs().float() for linear, gate in gates_of(model, self.type, ScoreGate)}
        for gates in self.pools(model):
            together = torch.cat([sizes[gate].flatten() for gate in gates])
            scale = together.std().clamp(min=torch.finfo(torch.float32).tiny)
            for gate in gates:
                gate.scores.copy_((sizes[gate] - together.mean()) / scale)

    def pools(self, model: nn.Module) -> list[list[ScoreGate]]:
        gates = [gate for _, gate in gates_of(model, self.type, ScoreGate)]
        scope = self.scope or ("global" if self.variant == "hard" else "layer")
        return [gates] if scope == "global" else [[gate] for gate in gates]

    def shares(self, model: nn.Module) -> dict[str, float]:
        return {"sparsity": sparsity_now(model, self.type)}

    def check(self) -> str | None:
        if self.scope == "global" and self.variant == "soft":
            return "pass movement.scope: variant soft has one threshold for all layers and none to share; remove it"
        return super().check()
