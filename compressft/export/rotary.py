"""Rotary positions whose frequencies follow the length: how far they can be exported, and in which form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from compressft.model.surgery import replace

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Kinds whose frequencies depend on the length; linear, yarn and llama3 fix theirs beforehand.
BY_LENGTH = ("dynamic", "longrope")


class RotaryEmbedding(Protocol):
    """What is read of transformers' modules for rotary positions."""

    config: PretrainedConfig
    attention_scaling: float


class DynamicRotary(nn.Module):
    """NTK scaling by the length ("dynamic") without the branches and the memory that transformers' module has.

    transformers computes frequencies again when a longer row than any before comes, which no graph can say. Here every
    call does, from its own longest row: the same for the first call, for rows up to `max_position_embeddings`, which
    have the plain frequencies, and while a text grows.
    """

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.config, self.scaling = rotary.config, rotary.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B, T, D) of places (B, T), in the dtype of x."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, x.device, seq_len=position_ids.max() + 1)
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * self.scaling).to(x.dtype), (angles.sin() * self.scaling).to(x.dtype)


def without_branches(model: nn.Module) -> nn.Module:
    """The same model, its dynamic rotary positions in the form that a graph can hold."""
    for path, module in list(model.named_modules()):
        if getattr(module, "rope_type", None) == "dynamic":
            replace(model, path, DynamicRotary(cast("RotaryEmbedding", module)))
    return model


def mixed_lengths(config: PretrainedConfig, lengths: Sequence[int]) -> str | None:
    """Why rows of these lengths have another result in another batch; None where they have not.

    transformers takes one set of frequencies for a whole batch, by the longest row in it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind, longest = rope.get("rope_type"), max(lengths, default=0)
    limit = config.max_position_embeddings
    if kind == "longrope":
        limit = rope["original_max_position_embeddings"]
    beyond = longest > limit and (kind == "dynamic" or (kind == "longrope" and min(lengths) <= limit))
    if not beyond:
        return None
    return (
        f"data.max_length: a row has {longest} tokens, and beyond {limit} rotary positions of kind {kind!r} are those "
        f"of the longest row in a batch: rows would depend on those next to them; set it to {limit} or less"
    )
