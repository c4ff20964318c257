"""Partial fine-tuning: only the top k layers (and pooler and head) are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.surgery import freeze, head_parameters
from compressft.transform import Context, Transform


class Layers(Transform):
    """Freeze the embeddings and all layers below the top `top` (Lee, Tang & Lin 2019, arXiv:1911.03090).

    Nothing below the cut requires a gradient, so no graph is kept there. top = 0 trains the head alone; top = all
    layers also leaves the embeddings frozen, and a language model's output layer, tied to them or not: that is where it
    differs from `full`.
    """

    type: Literal["layers"] = "layers"
    top: int = Field(ge=0)

    def prepare(self, model: nn.Module, context: Context) -> None:
        parts = anatomy(model)
        if self.top > len(parts.layers):
            raise UserError(f"method.top: {self.top} layers asked for; the model has {len(parts.layers)}")
        freeze(model)
        trained = parts.layers[len(parts.layers) - self.top :]
        for layer in trained:
            layer.module.requires_grad_(True)
        for _, parameter in head_parameters(model):
            parameter.requires_grad_(True)
        # An encoder-decoder has one behind each stack.
        for norm in {layer.family.final_norm for layer in trained}:
            if norm is not None:
                parts.backbone.get_submodule(norm).requires_grad_(True)
