"""HeadGate: the hard-concrete gates of Voita et al., one per attention head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressft.modules.concrete import EDGE, deterministic, open_probability
from compressft.modules.gate import GroupGate

# Voita et al. (2019); movement pruning and CoFi have others.
TEMPERATURE = 0.33
# Gates without noise are exactly 1 from ln 11 = 2.398 on, and exactly 0 up to -2.398.
INITIAL = 3.0


class HeadGate(GroupGate):
    """A factor in [0, 1] per head (KV group), on the head's output, before the output projection.

    Parameter `log_alpha` (heads,); buffers `noise` (heads,), the logit of this step's uniform draw, so that every
    forward of a step sees the same gates, and `mask` (heads,), the gates without noise (and without temperature).
    Training uses the noisy gates while `sampling` is on; evaluation, and training afterwards, use `mask`.
    """

    noise: Tensor

    def __init__(self, groups: int, size: int, generator: torch.Generator) -> None:
        super().__init__(groups, size)
        self.log_alpha = nn.Parameter(torch.full((groups,), INITIAL))
        self.register_buffer("noise", torch.logit(torch.rand(groups, generator=generator), EDGE))
        self.sampling = False

    def columns(self) -> Tensor:
        if not (self.sampling and self.training):
            return super().columns()
        z = deterministic(self.log_alpha + self.noise, temperature=TEMPERATURE)
        return self.by_column(z)

    def probability(self) -> Tensor:
        """P(gate > 0) per head, differentiable."""
        return open_probability(self.log_alpha, TEMPERATURE)

    @torch.no_grad()
    def advance(self) -> None:
        """After an optimiser step: bring `mask` up to date and draw new noise; nothing where no step has been made."""
        if self.log_alpha.grad is not None:
            self.mask.copy_(deterministic(self.log_alpha))
            self.noise.copy_(torch.logit(torch.rand_like(self.noise), EDGE))
