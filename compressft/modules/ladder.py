"""A ladder next to a backbone: small transformer blocks that read what each of its layers hands on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from compressft_kernels.reference.bottleneck import ACTIVATIONS
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.modules.dtypes import like
from compressft.modules.families import FAMILIES
from compressft.modules.kinds import known
from compressft.modules.side import blended, own_layers
from compressft.modules.tap import Tap
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin

# Width of an attention head, where `size` is a multiple.
HEAD = 16


class Rung(nn.Module):
    """s <- s + W_o Attention(LN(s)), then s <- s + W_2 gelu(W_1 LN(s)), 4 * size wide inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(size // HEAD, 1), 0, -1) if size % n == 0)
        self.attention_norm = nn.LayerNorm(size)
        self.attention = nn.Linear(size, 3 * size)
        self.attention_out = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.inner = nn.Linear(size, 4 * size)
        self.outer = nn.Linear(4 * size, size)

    def forward(self, s: Tensor, seen: Tensor | None, cached: CacheLayerMixin | None) -> Tensor:
        """(B, T, size) -> (B, T, size).

        Args:
            seen: which keys a token attends to, bool (B or 1, 1, T or 1, keys); None for all.
            cached: a cache's layer with the keys and values of earlier tokens; it keeps these too.
        """
        shape = (*s.shape[:2], 3, self.heads, s.shape[2] // self.heads)
        query, key, value = self.attention(self.attention_norm(s)).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        if cached is not None:
            key, value = cached.update(key, value)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, seen)
        s = s + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return s + self.outer(ACTIVATIONS["gelu"](self.inner(self.norm(s))))


@known
class SideLadder(Tap):
    """S climbs along B: one small block per layer reads B's states there (Sung et al. 2022, ladder side-tuning).

    s_0 = D_0 h_0, s_i = rung_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i), S = B + U s_L, where h_i is what layer i hands on,
    D_i maps it to the ladder's `size` and mu_i = sigmoid(`mix[i]`), from 0. Rungs attend among the tokens that B
    attends to, without positions of their own: B's states hold them. U starts at 0: S is B at first. Parameter `blend`
    (), from 0, for `blended`.

    Args:
        layers: of B.
        width: of B.
        size: of the ladder.
    """

    kind: ClassVar[str] = "side_ladder"
    above_norm = True
    wants = ("attention_mask",)
    # A backbone may make the cache itself.
    wants_of_layer = ("past_key_values",)
    causal: bool

    def __init__(self, layers: int, width: int, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.blend = nn.Parameter(torch.zeros(()))
        self.size = size
        with torch.device("meta"):
            self.down = nn.ModuleList([nn.Linear(width, size) for _ in range(layers + 1)])
            self.rungs = nn.ModuleList([Rung(size) for _ in range(layers)])
            self.up = nn.Linear(size, width)
        for child in (self.down, self.rungs, self.up):
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

    def describe(self) -> dict[str, JSON]:
        return {"layers": len(self.rungs), "width": self.up.out_features, "size": self.size}

    def attach(self, owner: PreTrainedModel) -> None:
        super().attach(owner)
        self.causal = FAMILIES[owner.config.model_type].causal

    def top(self, states: list[Tensor], last: Tensor, inputs: Mapping[str, object]) -> Tensor:
        cache, mask, new = inputs["past_key_values"], inputs["attention_mask"], last.shape[1]
        assert mask is None or isinstance(mask, Tensor)
        if mask is not None and mask.dim() != 2:
            raise UserError("method side.network: 'ladder' reads attention_mask as (batch, tokens); give it so")
        layers: Sequence[CacheLayerMixin | None] = [None] * len(self.rungs)
        past = 0
        if cache is not None:
            layers = own = own_layers(cache, len(states), new, self._new_layers)
            past = own[0].get_seq_length()
        seen = visible(mask, new, past, self.causal, last.device)
        return blended(self.blend, last, last + like(last, self(list(like(self.mix, *states, last)), seen, layers))[0])

    def _new_layers(self) -> list[CacheLayerMixin]:
        from transformers.cache_utils import DynamicLayer

        return [DynamicLayer() for _ in self.rungs]

    def forward(self, states: list[Tensor], seen: Tensor | None, layers: Sequence[CacheLayerMixin | None]) -> Tensor:
        """U s_L of the embeddings' and layers' outputs, each (B, T, d); `seen` and a cache's `layers` as `Rung`'s."""
        if len(states) != len(self.down):
            raise ValueError(f"side_ladder: {len(states)} outputs given, made for {len(self.down)}")
        s = self.down[0](states[0])
        shares = torch.sigmoid(self.mix)
        for i, (state, rung) in enumerate(zip(states[1:], self.rungs, strict=True)):
            s = shares[i] * s + (1.0 - shares[i]) * self.down[i + 1](state)
            s = rung(s, seen, layers[i])
        return self.up(s)


def visible(mask: Tensor | None, new: int, past: int, causal: bool, device: torch.device) -> Tensor | None:
    """Which of past + new keys each of the new tokens attends to, bool (B or 1, 1, new or 1, past + new); None: all.

    Args:
        mask: (B, past + new), 0 for padding; None without.
    """
    kept = None if mask is None else (mask != 0)[:, None, None, :]
    if not causal:
        return kept
    place = torch.arange(new, device=device)[:, None] + past
    keys = torch.arange(past + new, device=device)[None, :]
    earlier = keys <= place
    # Padding on the left sees itself: a row without any key has no softmax.
    return earlier if kept is None else (earlier & kept) | (keys == place)
