"""ConcreteGate: groups of columns whose gates are learned by gradient descent."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compressft.modules.concrete import EDGE, TEMPERATURE, deterministic, open_probability
from compressft.modules.gate import GroupGate

# CoFi (Xia, Zhong & Chen 2022): every step's clamp, and the factor of the deployed gates' sigmoid.
LOWEST, HIGHEST = math.log(0.01), math.log(100.0)
# P(open) = 0.99. CoFi starts from HIGHEST, where a gate has hardly a gradient: short runs then overshoot.
INITIAL = 3.0
SHARPNESS = 0.8


class ConcreteGate(GroupGate):
    """Hard-concrete gates, one per group of `size` adjacent columns (Louizos et al. 2018, as CoFi uses them).

    Parameter `log_alpha` (groups,); buffers `noise` (groups,), the logit of this step's uniform draw, so that every
    forward of a step sees the same gates, and `mask` (groups,), the factors that would be deployed now: 0, or
    sigmoid(0.8 * log_alpha / temperature). Training uses the noisy gates while `sampling` is on; evaluation and
    training afterwards use `mask`.
    """

    noise: Tensor

    def __init__(self, groups: int, size: int, generator: torch.Generator) -> None:
        super().__init__(groups, size)
        self.log_alpha = nn.Parameter(torch.full((groups,), INITIAL))
        self.register_buffer("noise", _logit(torch.rand(groups, generator=generator)))
        self.sampling = False

    def columns(self) -> Tensor:
        if not (self.sampling and self.training):
            return super().columns()
        z = deterministic(self.log_alpha + self.noise, temperature=TEMPERATURE)
        return self.by_column(z)

    def probability(self) -> Tensor:
        """P(gate != 0) per group, differentiable."""
        return open_probability(self.log_alpha)

    @torch.no_grad()
    def advance(self) -> None:
        """After an optimiser step: clamp `log_alpha` and draw new noise; nothing where no step has been made."""
        if self.log_alpha.grad is not None:
            self.log_alpha.clamp_(LOWEST, HIGHEST)
            self.noise.copy_(_logit(torch.rand_like(self.noise)))

    @torch.no_grad()
    def settle(self, groups: Tensor, binary: bool = False) -> None:
        """Set `mask`: these groups live with their fraction (`binary`: with 1), the others are 0."""
        value = torch.ones_like(self.mask) if binary else torch.sigmoid(SHARPNESS * self.log_alpha / TEMPERATURE)
        self.mask.zero_()
        self.mask[groups] = value[groups]


def _logit(uniform: Tensor) -> Tensor:
    return torch.logit(uniform.clamp(EDGE, 1.0 - EDGE))
