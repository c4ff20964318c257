"""SparseGPT: prune once by second-order saliency, and let the weights that stay make up for those that go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressft.modules.linear import CompressedLinear
from compressft.modules.sparsegpt import sparsegpt
from compressft.passes.shared.one_shot import OneShot
from compressft.passes.shared.unstructured import present
from compressft.transform import Resource, Want


class SparseGPT(OneShot):
    """Frantar & Alistarh (2023): least-squares reconstruction of each layer's outputs on training rows.

    Weights are changed before training also where the method freezes them. Exactly round((1 - sparsity) * N) weights
    of each layer stay, or N of every M adjacent columns. `damping`: added to the inputs' second moments, as a share of
    their mean.
    """

    type: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(default=0.01, gt=0)

    @torch.no_grad()
    def prune(self, linear: CompressedLinear, moment: Tensor) -> Tensor:
        old = present(linear)
        new, mask = sparsegpt(old, moment, self.target, self.groups, self.damping)
        linear.weight += new - old
        return mask

    def wants(self) -> Sequence[Want]:
        reason = "changes weights before training"
        return (*super().wants(), Want(Resource.STORE, reason, fix="prune in an earlier stage"))
