"""Partial fine-tuning: only the top k layers (and pooler and head) are trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from compressft.anatomy import anatomy
from compressft.errors import UserError
from compressft.model import freeze, head_parameters
from compressft.transform import Context, Transform


class Layers(Transform):
    """Freeze the embeddings and all layers below the top `top` (Lee, Tang & Lin 2019, arXiv:1911.03090).

    Nothing below the cut requires a gradient, so no graph is kept there. An output embedding that is tied to the
    frozen input embedding stays frozen. top = 0 trains the head alone; top = all layers also leaves the embeddings
    frozen, which is where it differs from `full`.
    """

    type: Literal["layers"] = "layers"
    top: int = Field(ge=0)

    def prepare(self, model: nn.Module, context: Context) -> None:
        parts = anatomy(model)
        if self.top > len(parts.layers):
            raise UserError(f"method.top: {self.top} layers asked for; the model has {len(parts.layers)}")
        freeze(model)
        for layer in parts.layers[len(parts.layers) - self.top :]:
            layer.module.requires_grad_(True)
        _unfreeze_head(model)
        if parts.family.causal and self.top > 0:
            # The final norm of pre-norm stacks sits above the top layer.
            for name in ("norm", "ln_f"):
                if hasattr(parts.backbone, name):
                    parts.backbone.get_submodule(name).requires_grad_(True)


def _unfreeze_head(model: nn.Module) -> None:
    tied = {id(parameter) for module in anatomy(model).backbone.modules() if isinstance(module, nn.Embedding)
            for parameter in module.parameters()}
    for _, parameter in head_parameters(model):
        if id(parameter) not in tied:
            parameter.requires_grad_(True)
