"""Scalar mix: a frozen model whose head reads a learned weighted sum of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.model.anatomy import anatomy, refuse_pairs
from compressft.modules.scalar_mix import LayerMix, Normalise
from compressft.transform import Context, Resource, Transform, Want

NAME = "scalar_mix"
# What everything wants that looks at each layer's output.
EVERY_LAYER = tuple(
    Want(one, "reads every layer's output", fix="do it in a stage before") for one in (Resource.LAYERS, Resource.HIDDEN)
)


class ScalarMix(Transform):
    """Peters et al. (NAACL 2018), equation 1: gamma sum_j softmax(w)_j h_j feeds pooler and head; the rest is frozen.

    In pre-norm families it feeds the final norm. w starts at 0 and gamma at 1, the mean of the layers: not the
    model as it was. Weight decay does not touch them.

    Fields: `embeddings`: mix the embeddings' output in as well. `normalise`: "batch" (ELMo's) normalises each layer's
    output over all real tokens of the batch first, so that a row's result depends on its batch mates, in the exported
    file too; "row" over the row's own; encoders only. `penalty` times ||w||^2 is added to the loss.
    """

    type: Literal["scalar_mix"] = "scalar_mix"
    embeddings: bool = True
    normalise: Normalise = "none"
    penalty: float = Field(default=0.0, ge=0)

    def prepare(self, model: nn.Module, context: Context) -> None:
        refuse_pairs(model, "method scalar_mix")
        Layers(top=0).prepare(model, context)
        add_mix(model, self.embeddings, self.normalise).requires_grad_(True)

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        return [{"params": list(mix_of(model).parameters()), "weight_decay": 0.0}]

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        if self.penalty == 0:
            return {}
        return {"scalar_mix.penalty": self.penalty * mix_of(model).weights.square().sum()}

    def wants(self) -> Sequence[Want]:
        return EVERY_LAYER


def add_mix(model: nn.Module, embeddings: bool, normalise: Normalise) -> LayerMix:
    """Put a scalar mix into the model's backbone; one of an earlier stage that is like it goes on.

    Raises:
        UserError: statistics over tokens are asked of a decoder, whose tokens must not see later ones; an earlier
            stage's mix is another.
    """
    parts = anatomy(model)
    if normalise != "none" and parts.family.causal:
        raise UserError(f"method scalar_mix.normalise: {normalise!r} lets tokens see later ones; set it to 'none'")
    new = LayerMix(len(parts.layers) + int(embeddings), embeddings, normalise)
    old = getattr(parts.backbone, NAME, None)
    if old is not None:
        if old.describe() != new.describe():
            raise UserError("method scalar_mix: an earlier stage mixes other layers, or otherwise; give it its fields")
        return old
    parts.backbone.add_module(NAME, new.to(next(model.parameters()).device))
    new.attach(parts.backbone)
    return new


def mix_of(model: nn.Module) -> LayerMix:
    """The model's scalar mix."""
    return getattr(anatomy(model).backbone, NAME)
