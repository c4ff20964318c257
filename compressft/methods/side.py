"""Side-tuning: a frozen model, and a side network that is trained and blended with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.scalar_mix import EVERY_LAYER
from compressft.model.anatomy import anatomy, positions, refuse_pairs
from compressft.model.load import load_model
from compressft.modules.kinds import KINDS
from compressft.modules.ladder import SideLadder
from compressft.modules.pretrained import pretrained
from compressft.modules.side import SideNetwork, build
from compressft.transform import Context, Resource, Transform, Want
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "side"


class Side(Transform):
    """Zhang et al. (ECCV 2020): R(x) = alpha B(x) + (1 - alpha) S(x) on the final hidden states; B is frozen.

    alpha = sigmoid(a), a learned from 0 without weight decay. B's own learning needs no backward pass: nothing in it
    keeps a graph, unless a pass learns gates there.

    Fields: `network`: "copy" (S starts as B: the identity at first), "ladder" (small transformer blocks, one next to
    each layer, read B's states), or a folder or hub id of another model, whose states are projected where its width is
    another. `size`: width of the ladder; default d / 8.
    """

    type: Literal["side"] = "side"
    network: str = "copy"
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _size_of_ladder(self) -> Side:
        if self.size is not None and self.network != "ladder":
            raise ValueError(f"size is the ladder's width, network is {self.network!r}; set it to 'ladder'")
        return self

    def prepare(self, model: nn.Module, context: Context) -> None:
        refuse_pairs(model, "method side")
        parts = anatomy(model)
        if hasattr(parts.backbone, NAME):
            raise UserError("method side: an earlier stage left a side network in the model; use another method here")
        generator = torch.Generator().manual_seed(context.seed)
        new: SideLadder | SideNetwork
        if self.network == "ladder":
            new = SideLadder(len(parts.layers), parts.width, self.size or max(parts.width // 8, 1), generator)
        else:
            new = self._network(model, context, generator)
        Layers(top=0).prepare(model, context)
        parts.backbone.add_module(NAME, new.to(next(model.parameters()).device).requires_grad_(True))
        new.attach(parts.backbone)

    def _network(self, model: nn.Module, context: Context, generator: torch.Generator) -> SideNetwork:
        parts = anatomy(model)
        if self.network == "copy":
            if any(hasattr(module, "attach") for module in parts.backbone.modules()):
                raise UserError("method side.network: 'copy' of a model with modules that act on others; use 'ladder'")
            network = copy.deepcopy(parts.backbone)
        else:
            loaded = pretrained(load_model(self.network, "AutoModel"))
            network = pretrained(loaded.base_model)
            self._check_fits(network, model)
            for fit in context.fit_teacher:
                fit(network)
        if getattr(network, "pooler", None) is not None:
            network.add_module("pooler", None)
        config = json.loads(network.config.to_json_string(use_diff=False))
        self._check(network, config, model)
        with torch.random.fork_rng(devices=[]):
            new = SideNetwork(config, parts.width, network)
        if new.project is not None:
            bound = new.project.in_features**-0.5
            nn.init.uniform_(new.project.weight, -bound, bound, generator=generator)
            nn.init.zeros_(new.project.bias)
        return new

    def _check_fits(self, network: PreTrainedModel, model: nn.Module) -> None:
        """Refuse what could not read the model's rows, or would show a language model the tokens that it predicts."""
        family, who = anatomy(network).family, f"method side.network: {self.network!r}"
        if family.decoder is not None:
            raise UserError(f"{who} is an encoder-decoder; give a single stack of layers, or 'ladder'")
        if anatomy(model).family.causal and pretrained(model).get_output_embeddings() is not None and not family.causal:
            raise UserError(f"{who} sees later tokens, which a language model must not; give a decoder, or 'ladder'")
        places = [positions(one) for one in (network, model)]
        if places[0] is not None and places[0] < (places[1] or 0):
            raise UserError(f"{who} has {places[0]} positions, the model {places[1]}; give one with as many")

    def _check(self, network: PreTrainedModel, config: Mapping[str, JSON], model: nn.Module) -> None:
        """Refuse what a saved folder could not build again, and another vocabulary."""
        with torch.device("meta"):
            again = build(config)
        shapes = [{name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (network, again)]
        if shapes[0] != shapes[1] or any(getattr(type(m), "kind", None) in KINDS for m in network.modules()):
            raise UserError(
                f"method side.network: {self.network!r} is a compressed model, which cannot be a side network; "
                "give an uncompressed one, or 'ladder'"
            )
        tables = [pretrained(one).get_input_embeddings() for one in (network, model)]
        rows = [table.num_embeddings for table in tables]
        if rows[0] != rows[1]:
            raise UserError(
                f"method side.network: {self.network!r} has {rows[0]} vocabulary rows, the model {rows[1]}; "
                "give a model with the same tokenizer"
            )

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        side: SideLadder | SideNetwork = getattr(anatomy(model).backbone, NAME)
        return [{"params": [side.blend], "weight_decay": 0.0}]

    def inputs(self) -> Sequence[str]:
        return () if self.network in ("copy", "ladder") else (self.network,)

    def wants(self) -> Sequence[Want]:
        if self.network != "copy":
            return EVERY_LAYER
        reason = "'copy' wants shapes that a configuration states"
        fix = "set it to 'ladder', or cut in a stage after this one"
        return (*EVERY_LAYER, Want(Resource.STARTING_SHAPES, reason, "network", fix))
