"""Wanda: prune by weight magnitude times input norm, without touching what stays."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from compressft.modules.linear import CompressedLinear
from compressft.modules.rank import keep_pattern
from compressft.passes.shared.one_shot import OneShot
from compressft.passes.shared.unstructured import present


class Wanda(OneShot):
    """Remove the weights with the smallest |W_ij| * ||x_j||_2, compared within each output row (Sun et al. 2024).

    Exactly round((1 - sparsity) * in) weights of every row stay, or N of every M adjacent columns.
    """

    type: Literal["wanda"] = "wanda"

    def prune(self, linear: CompressedLinear, moment: Tensor) -> Tensor:
        # Inputs that are never active have moment 0 but for rounding.
        score = present(linear).abs().float() * moment.diagonal().clamp(min=0).sqrt()
        if self.groups:
            return keep_pattern(score, *self.groups)
        width = score.shape[1]
        return keep_pattern(score, round((1.0 - self.target) * width), width)
