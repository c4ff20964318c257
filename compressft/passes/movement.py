"""Movement pruning: learned scores decide which weights go, and weights that move away from 0 gain score."""

from __future__ import annotations

from typing import Literal

import torch

from compressft.modules.gate import Gate, ScoreGate
from compressft.modules.linear import CompressedLinear
from compressft.passes.scored import Scored
from compressft.passes.unstructured import present


class Movement(Scored):
    """Train a score S per weight with dL/dS = dL/dW' * W, beside the weights (Sanh, Wolf & Rush 2020).

    `hard`: the highest scores of each tensor stay, exactly round((1 - sparsity) * N) once the schedule is at its end.
    `soft`: weights stay while sigmoid(S) > tau, with tau on its way from 0 to `threshold`, under the penalty
    lambda * mean over tensors of mean(sigmoid(S)), lambda = `penalty` * tau / `threshold`; at least 0.5 % of a tensor
    stays. How sparse the soft variant becomes follows from `penalty` (and the number of steps times `learning_rate`),
    so it takes no `sparsity`: use hard for a target.

    Fields: `learning_rate` of the scores, which have no weight decay; it follows the stage's scheduler. Pruned weights
    keep getting score gradients and may return until progress `freeze`; from there on the masks stay. `initial`: scores
    start at 0, as in the paper, or at each |weight| of a tensor, shifted and scaled to mean 0 and standard deviation 1:
    what training does not move is then ranked by its magnitude.
    """

    type: Literal["movement"] = "movement"
    initial: Literal["zero", "magnitude"] = "zero"

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        gate = ScoreGate(linear.out_features, linear.in_features)
        if self.initial == "magnitude":
            size = present(linear).abs().float()
            with torch.no_grad():
                gate.scores.copy_((size - size.mean()) / size.std().clamp(min=torch.finfo(torch.float32).tiny))
        return gate
