"""Side networks: something small that is trained beside a frozen backbone, and blended with its final hidden states."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from compressft_kernels.reference.bottleneck import ACTIVATIONS
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.modules.attention import TRAINING
from compressft.modules.dtypes import like
from compressft.modules.kinds import known
from compressft.modules.tap import Tap

# What a side network is given of the backbone's arguments.
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class Side(Tap):
    """alpha B(x) + (1 - alpha) S(x), alpha = sigmoid(`blend`), B(x) the final hidden states (Zhang et al. 2020).

    Parameter `blend` (), from 0. B needs no gradient: a frozen B keeps no graph.
    """

    above_norm = True

    def __init__(self) -> None:
        super().__init__()
        self.blend = nn.Parameter(torch.zeros(()))

    def blended(self, last: Tensor, side: Tensor) -> Tensor:
        """Both (B, T, d)."""
        alpha = torch.sigmoid(self.blend)
        return alpha * last + (1.0 - alpha) * side


@known
class SideNetwork(Side):
    """S is a whole model without head, `network`; `project` brings its states to B's width where they are narrower.

    Its keys and values lie in B's cache, in layers above B's: what reorders, repeats or crops B's does so with them.

    Args:
        config: of the network, as JSON values with `model_type`.
        width: of B.
    """

    kind: ClassVar[str] = "side_network"
    # B's configuration.
    owner: tuple[Any]
    wants = INPUTS
    wants_of_layer = ("past_key_values",)

    def __init__(self, config: dict[str, Any], width: int, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.network: Any = build(config) if network is None else network
        own = self.network.config.hidden_size
        self.project = None if own == width else nn.Linear(own, width)
        self.width = width
        self.takes = [name for name in INPUTS if name in inspect.signature(self.network.forward).parameters]

    def describe(self) -> dict[str, Any]:
        return {"config": self.config, "width": self.width}

    def attach(self, owner: nn.Module) -> None:
        super().attach(owner)
        self.owner = (owner.config,)

    def top(self, states: list[Tensor], last: Tensor, inputs: dict[str, Any]) -> Tensor:
        given = {name: inputs[name] for name in self.takes if inputs[name] is not None}
        # It attends as B does, in an exported file too.
        self.network.config._attn_implementation = self.owner[0]._attn_implementation
        if "use_cache" in inspect.signature(self.network.forward).parameters:
            cache = inputs["past_key_values"]
            given["use_cache"] = cache is not None
            given["past_key_values"] = None if cache is None else self._layers_of(cache, len(states), last.shape[1])
        side = self.network(**given).last_hidden_state
        return self.blended(last, side if self.project is None else self.project(side))

    def _layers_of(self, cache: Any, below: int, new: int) -> Any:
        """The network's part of a cache to which `below` layers of B have just added `new` tokens."""
        from transformers import Cache, DynamicCache

        if not isinstance(cache, DynamicCache):
            raise UserError(
                f"method side: a side network's keys and values are not kept in a {type(cache).__name__}; "
                "generate without cache_implementation"
            )
        if len(cache.layers) == below:
            cache.layers.extend(DynamicCache(config=self.network.config).layers)
        own = Cache(layers=cache.layers[below:])
        if own.get_seq_length() != cache.get_seq_length() - new:
            raise UserError("method side: this cache was filled without the side network; start with an empty one")
        return own


def build(config: dict[str, Any]) -> Any:
    """A model without head of a configuration, its weights still to be loaded."""
    from transformers import AutoConfig, AutoModel

    values = dict(config)
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    network: Any = AutoModel.from_config(settings, attn_implementation=TRAINING, dtype=torch.float32)
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    return network


@known
class SideLadder(Side):
    """S climbs along B: one small block per layer reads B's states there (Sung et al. 2022, ladder side-tuning).

    s_0 = D_0 h_0, s_i = block_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i), S = B + U s_L, where h_i is what layer i hands on,
    D_i maps it to the ladder's `size` and mu_i = sigmoid(`mix[i]`), from 0. A block is s + W_2 gelu(W_1 LN(s)),
    4 * size wide inside: it works on each token alone, attention is B's. U starts at 0: S is B at first.

    Args:
        layers: of B.
        width: of B.
        size: of the ladder.
    """

    kind: ClassVar[str] = "side_ladder"

    def __init__(self, layers: int, width: int, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.size = size
        with torch.device("meta"):
            self.down = nn.ModuleList([nn.Linear(width, size) for _ in range(layers + 1)])
            self.norms = nn.ModuleList([nn.LayerNorm(size) for _ in range(layers)])
            self.inner = nn.ModuleList([nn.Linear(size, 4 * size) for _ in range(layers)])
            self.outer = nn.ModuleList([nn.Linear(4 * size, size) for _ in range(layers)])
            self.up = nn.Linear(size, width)
        for child in (self.down, self.norms, self.inner, self.outer, self.up):
            child.to_empty(device="cpu")
        self.mix = nn.Parameter(torch.zeros(layers))
        generator = generator or torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.up.weight)

    def describe(self) -> dict[str, Any]:
        return {"layers": len(self.norms), "width": self.up.out_features, "size": self.size}

    def top(self, states: list[Tensor], last: Tensor, inputs: dict[str, Any]) -> Tensor:
        return self.blended(last, last + like(last, self(list(like(self.mix, *states, last))))[0])

    def forward(self, states: list[Tensor]) -> Tensor:
        """U s_L of the embeddings' and layers' outputs, each (B, T, d)."""
        if len(states) != len(self.down):
            raise ValueError(f"side_ladder: {len(states)} outputs given, made for {len(self.down)}")
        s = self.down[0](states[0])
        shares = torch.sigmoid(self.mix)
        for i, state in enumerate(states[1:]):
            s = shares[i] * s + (1.0 - shares[i]) * self.down[i + 1](state)
            s = s + self.outer[i](ACTIVATIONS["gelu"](self.inner[i](self.norms[i](s))))
        return self.up(s)
