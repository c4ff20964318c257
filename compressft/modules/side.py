"""Side networks: something small, trained next to a frozen backbone and blended with its final hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.modules.attention import TRAINING
from compressft.modules.kinds import known
from compressft.modules.tap import Tap
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin

# What a side network is given of the backbone's arguments.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


def blended(blend: Tensor, last: Tensor, side: Tensor) -> Tensor:
    """alpha B(x) + (1 - alpha) S(x), alpha = sigmoid(`blend`); both (B, T, d) (Zhang et al. 2020)."""
    alpha = torch.sigmoid(blend)
    return alpha * last + (1.0 - alpha) * side


@known
class SideNetwork(Tap):
    """S is a whole model without head, `network`; `project` brings its states to B's width where they are narrower.

    Parameter `blend` (), from 0, for `blended`. B needs no gradient: a frozen B keeps no graph.

    Args:
        config: of the network, as JSON values with `model_type`.
        width: of B.
    """

    kind: ClassVar[str] = "side_network"
    above_norm = True
    # B's configuration.
    owner: tuple[PretrainedConfig]
    wants = INPUTS
    # A backbone may make the cache itself.
    wants_of_layer = ("past_key_values",)

    def __init__(self, config: dict[str, JSON], width: int, network: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.blend = nn.Parameter(torch.zeros(()))
        self.config = config
        self.network = build(config) if network is None else network
        own = self.network.config.hidden_size
        self.project = None if own == width else nn.Linear(own, width)
        self.width = width
        self.takes = [name for name in INPUTS if name in inspect.signature(self.network.forward).parameters]

    def describe(self) -> dict[str, JSON]:
        return {"config": self.config, "width": self.width}

    def attach(self, owner: PreTrainedModel) -> None:
        super().attach(owner)
        self.owner = (owner.config,)

    def top(self, states: list[Tensor], last: Tensor, inputs: Mapping[str, object]) -> Tensor:
        given: dict[str, object] = {name: inputs[name] for name in self.takes if inputs[name] is not None}
        # It attends as B does, in an exported file too.
        self.network.config._attn_implementation = self.owner[0]._attn_implementation
        if "use_cache" in inspect.signature(self.network.forward).parameters:
            cache = inputs["past_key_values"]
            given["use_cache"] = cache is not None
            if cache is not None:
                from transformers import Cache

                own = own_layers(cache, len(states), last.shape[1], self._new_layers)
                given["past_key_values"] = Cache(layers=[*own])
        side = self.network(**given).last_hidden_state
        return blended(self.blend, last, side if self.project is None else self.project(side))

    def _new_layers(self) -> list[CacheLayerMixin]:
        from transformers import DynamicCache

        return key_values(DynamicCache(config=self.network.config).layers)


def own_layers(cache: object, below: int, new: int, make: Callable[[], list[CacheLayerMixin]]) -> list[CacheLayerMixin]:
    """A side network's layers of a cache, above B's: what reorders, repeats or crops B's does so with them.

    Args:
        cache: to which B's `below` layers have just added `new` tokens.
        make: new layers.

    Raises:
        UserError: another kind of cache; one that was filled while the side network was not there.
    """
    from transformers import DynamicCache

    if not isinstance(cache, DynamicCache):
        raise UserError(
            f"method side: a side network's keys and values are not kept in a {type(cache).__name__}; "
            "generate without cache_implementation"
        )
    if len(cache.layers) == below:
        cache.layers.extend(make())
    own = key_values(cache.layers[below:])
    if own[0].get_seq_length() != cache.get_seq_length() - new:
        raise UserError("method side: this cache was filled without the side network; start with an empty one")
    return own


def key_values(layers: Iterable[object]) -> list[CacheLayerMixin]:
    """Those of a cache's layers that hold keys and values: all, in the families that we know."""
    from transformers.cache_utils import CacheLayerMixin

    return [layer for layer in layers if isinstance(layer, CacheLayerMixin)]


def build(config: Mapping[str, JSON]) -> PreTrainedModel:
    """A model without head of a configuration, its weights still to be loaded."""
    from transformers import AutoConfig, AutoModel

    values = dict(config)
    settings = AutoConfig.for_model(str(values.pop("model_type")), **values)
    network = AutoModel.from_config(settings, attn_implementation=TRAINING, dtype=torch.float32)
    if getattr(network, "pooler", None) is not None:
        network.add_module("pooler", None)
    return network
