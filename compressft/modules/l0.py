"""L0Gate: a hard-concrete gate for every single weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.concrete import deterministic, gated, open_probability
from compressft.modules.dtypes import like
from compressft.modules.gate import Gate


class L0Gate(Gate):
    """Every weight times its own gate in [0, 1], random while training, without noise once it is `settled`.

    Parameter `scores` (out, in) fp32: the log alpha of the hard-concrete distribution. Whether gates are settled is a
    function of progress, no state. Louizos, Welling & Kingma (2018) with the constants of Sanh, Wolf & Rush (2020).
    """

    weight_of_penalty: float = 0.0

    def __init__(self, rows: int, columns: int, initial: float) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full((rows, columns), initial))
        self.settled = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.training and not self.settled:
            return gated(weight, self.scores)
        return weight * deterministic(self.scores)

    def columns(self) -> None:
        """It knows no whole columns."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, *like(x, self(weight), bias))

    def settle(self, on: bool = True) -> None:
        """End (or go on with) noise and learning."""
        self.settled = on
        self.scores.requires_grad_(not on)

    @property
    def mask(self) -> Tensor:
        """Weights whose gate will not be 0, (out, in) bool."""
        return deterministic(self.scores.detach()) > 0

    def open(self) -> Tensor:
        """Mean probability that a gate is not 0, a differentiable scalar."""
        return open_probability(self.scores).mean()
