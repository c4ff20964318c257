"""Reformer's attention as a method: the whole model is trained on with queries for keys, hashed into buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import nn

from compressft.errors import UserError
from compressft.methods.full import TRAINED, Full
from compressft.model.anatomy import anatomy, refuse_pairs
from compressft.modules.attention import TRAINING, prefix_of
from compressft.modules.lsh import Hashing, Lsh, without_cache
from compressft.modules.pretrained import pretrained
from compressft.transform import Claim, Context, Resource, Transform


class LshAttention(Transform):
    """Kitaev, Kaiser & Levskaya, "Reformer" (ICLR 2020): O(T log T) attention, and everything is trained.

    No drop-in for a pretrained model: its queries and keys come from two projections, here the queries are the keys,
    and the model has to learn again to attend. The key projection stays where it is, frozen, and nothing reads it (in a
    fused projection, its rows). Who sees whom is hashed with rotations drawn from the stage's seed; they are saved with
    the model. Decoders generate without a cache. There is no ONNX form: set export.enabled to false.

    In encoders a chunk of `chunk` tokens, sorted by bucket, sees itself and the `look_back` chunks before it. In
    decoders a token sees the `look_back * chunk` tokens before it in its own bucket: the authors' chunks would let
    later tokens decide which earlier ones are seen. Rows of up to `chunk` tokens are attended to in full by encoders.

    Fields: `rounds` of hashing, each with other rotations, whose results are added up: more come nearer to attention
    over all tokens and cost in proportion. `buckets`, an even number; by default twice the longest training row
    divided by `chunk`, two buckets to a chunk.
    """

    type: Literal["lsh_attention"] = "lsh_attention"
    exports: ClassVar[bool] = False
    chunk: int = Field(default=64, ge=1)
    look_back: int = Field(default=1, ge=1)
    rounds: int = Field(default=4, ge=1)
    buckets: int | None = Field(default=None, ge=2)

    @field_validator("buckets")
    @classmethod
    def _even(cls, value: int | None) -> int | None:
        if value is not None and value % 2:
            raise ValueError(f"half of the buckets are the others' opposites; give an even number, such as {value + 1}")
        return value

    def prepare(self, model: nn.Module, context: Context) -> None:
        refuse_pairs(model, "method lsh_attention")
        config = pretrained(model).config
        if config._attn_implementation != TRAINING:
            raise UserError(
                f"method lsh_attention: the model's attention is {config._attn_implementation!r}, which cannot "
                "be replaced; load it with compressft's load_model"
            )
        layers = anatomy(model).layers
        if any(prefix_of(layer.part(layer.family.attention)) is not None for layer in layers):
            raise UserError("method lsh_attention: the model has a prefix; start from a model without one")
        Full().prepare(model, context)
        generator = torch.Generator().manual_seed(context.seed)
        buckets = self.buckets or self._buckets(model, context)
        for layer in layers:
            site = layer.part(layer.family.attention)
            new = Lsh(Hashing(layer.head_dim, buckets, self.rounds, self.chunk, self.look_back), generator)
            old = getattr(site, "lsh", None)
            if old is not None and old.describe() != new.describe():
                raise UserError("method lsh_attention: an earlier stage hashes otherwise; give it the same fields")
            if old is None:
                site.add_module("lsh", new.to(next(model.parameters()).device))
            if layer.family.k is not None:
                layer.part(layer.family.k).requires_grad_(False)
        without_cache(model)

    def _buckets(self, model: nn.Module, context: Context) -> int:
        """Two to a chunk of the longest row."""
        config = pretrained(model).config
        longest = config.max_position_embeddings if context.data is None else context.data.longest
        return 2 * max(round(longest / self.chunk), 1)

    def changes(self) -> Sequence[Claim]:
        return (*TRAINED, Claim(Resource.ATTENTION, "has no scores of keys and of all pairs"))
