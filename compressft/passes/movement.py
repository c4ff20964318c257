"""Movement pruning: learned scores decide which weights go, and weights that move away from 0 gain score."""

from __future__ import annotations

from typing import Literal

from compressft.modules.gate import Gate, ScoreGate
from compressft.modules.linear import CompressedLinear
from compressft.passes.scored import Scored


class Movement(Scored):
    """Train a score S per weight with dL/dS = dL/dW' * W, beside the weights (Sanh, Wolf & Rush 2020).

    `hard`: the highest scores of each tensor stay, exactly round((1 - sparsity) * N) once the schedule is at its end.
    `soft`: weights stay while sigmoid(S) > tau, with tau on its way from 0 to `threshold`, under the penalty
    lambda * mean over tensors of mean(sigmoid(S)), lambda = `penalty` * tau / `threshold`; at least 0.5 % of a tensor
    stays. How sparse the soft variant becomes follows from `penalty` (and the number of steps times `learning_rate`),
    so it takes no `sparsity`: use hard for a target.

    Fields: `learning_rate` of the scores, which have no weight decay; it follows the stage's scheduler. Pruned weights
    keep getting score gradients and may return until progress `freeze`; from there on the masks stay.
    """

    type: Literal["movement"] = "movement"

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        return ScoreGate(linear.out_features, linear.in_features)
