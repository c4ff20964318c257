"""Full fine-tuning: every parameter is trained (the reference that every other method is compared with)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from compressft.model.anatomy import anatomy
from compressft.model.surgery import freeze
from compressft.transform import Claim, Context, Resource, Transform

# What every method changes that trains the layers' own weights.
TRAINED = (Claim(Resource.VALUES, "trains the weights"),)


class Full(Transform):
    """Train everything, or everything but the embeddings.

    Frozen embeddings save their gradient and optimiser state: half of a small encoder's parameters.
    """

    type: Literal["full"] = "full"
    freeze_embeddings: bool = False

    def prepare(self, model: nn.Module, context: Context) -> None:
        model.requires_grad_(True)
        if self.freeze_embeddings:
            freeze(model, anatomy(model).embedding_paths)

    def changes(self) -> Sequence[Claim]:
        return TRAINED
