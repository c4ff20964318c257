"""WeightDiff: what a task adds to one frozen weight, made sparse by hard-concrete gates and then by an exact cut."""

from __future__ import annotations

import torch
from compressft_kernels import pack_mask, unpack_mask
from torch import Tensor, nn

from compressft.modules.concrete import deterministic, gated, open_probability, sample

# Guo, Rush & Kim (2021): a temperature of 1, and a stretch so wide that an even gate is open half of the time.
TEMPERATURE = 1.0
LOW, HIGH = -1.5, 1.5
INITIAL = 5.0


class WeightDiff(nn.Module):
    """z * w for the `delta` slot, (out, in): while gates are learned, and mask * w once the diff has been `cut`.

    Parameters `values` (w, from 0), `log_alpha` per entry and, where `grouped`, `group`, the log alpha of one more gate
    that all entries share. Gates are random in training and without noise in evaluation. Buffers: `bits`, the cut's
    mask at one bit an entry, and `cuts` (int64), whether it has been made. `fixed` follows `cuts` (`follow`), so that
    the forward need not look at a tensor.
    """

    bits: Tensor
    cuts: Tensor

    def __init__(self, rows: int, columns: int, grouped: bool) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(rows, columns))
        self.log_alpha = nn.Parameter(torch.full((rows, columns), INITIAL))
        self.group = nn.Parameter(torch.tensor(INITIAL)) if grouped else None
        self.register_buffer("bits", pack_mask(torch.ones(rows, columns, dtype=torch.bool)))
        self.register_buffer("cuts", torch.zeros((), dtype=torch.int64))
        self.fixed = False

    @property
    def gate_parameters(self) -> list[nn.Parameter]:
        """The log alphas."""
        return [self.log_alpha] if self.group is None else [self.log_alpha, self.group]

    def forward(self) -> Tensor:
        if self.fixed:
            return self.values * unpack_mask(self.bits, self.values.shape[1])
        if not self.training:
            return self.settled()
        product = gated(self.values, self.log_alpha, TEMPERATURE, LOW, HIGH)
        return product if self.group is None else product * sample(self.group, TEMPERATURE, LOW, HIGH)

    def penalty(self) -> Tensor:
        """Sum of the gates' probabilities to be open, a differentiable scalar; the group's counts as one entry's."""
        return torch.stack([open_probability(a, TEMPERATURE, LOW, HIGH).sum() for a in self.gate_parameters]).sum()

    def settled(self) -> Tensor:
        """z * w without noise, (out, in)."""
        z = deterministic(self.log_alpha, LOW, HIGH, TEMPERATURE)
        return (z if self.group is None else z * deterministic(self.group, LOW, HIGH, TEMPERATURE)) * self.values

    @torch.no_grad()
    def cut(self, mask: Tensor) -> None:
        """Take the gates' present values into w and let these entries (out, in) bool live on, without gates."""
        self.values.copy_(self.settled() * mask)
        self.bits.copy_(pack_mask(mask))
        self.cuts.fill_(1)
        self.follow()

    def follow(self) -> None:
        """Do as `cuts` says; after a resume nothing else knows."""
        self.fixed = bool(self.cuts)
        for parameter in self.gate_parameters:
            parameter.requires_grad_(not self.fixed)
