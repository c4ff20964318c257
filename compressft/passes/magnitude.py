"""Magnitude pruning: the smallest single weights go, gradually."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from compressft.modules.rank import keep_largest
from compressft.passes.shared.masked import Masked


class Magnitude(Masked):
    """Remove the fraction `sparsity` of the weights with the smallest |W|, along a schedule (Zhu & Gupta 2017).

    Exactly round((1 - sparsity) * N) weights stay, of all layers together (`scope` "global") or of each layer
    ("layer"). A removed weight keeps its stored value and gets no gradient; it returns if others become smaller than it
    before `end`. In a later stage the same pass with `start: 0` and the same sparsity keeps the zeros of the earlier
    one. Zeros of single weights save storage, not time: dense matrix products do not skip them.
    """

    type: Literal["magnitude"] = "magnitude"
    sparsity: float = Field(ge=0, lt=1)
    scope: Literal["global", "layer"] = "global"

    def choose(self, weights: list[Tensor], extent: float) -> list[Tensor]:
        kept = 1.0 - self.sparsity * extent
        pools = [weights] if self.scope == "global" else [[weight] for weight in weights]
        masks = []
        for pool in pools:
            masks += keep_largest([w.abs() for w in pool], round(kept * sum(w.numel() for w in pool)))
        return masks

    @property
    def target(self) -> float:
        return self.sparsity
