"""CompressedEmbedding: a table whose rows are int8 with one scale each or int4 in blocks, or looked up further down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.int4 import on_live_columns, straight_through
from compressft.modules.kinds import known
from compressft.modules.linear import is_bare, is_dense
from compressft.modules.quantizer import round_rows
from compressft.utils.texts import JSON


@known
class CompressedEmbedding(nn.Embedding):
    """Lookup of fake-quantised rows, straight-through gradient.

    `bits` 8: s8, scale = max|row| / 127. `bits` 4: symmetric blocks of `block` along the row
    (`compressft.modules.int4`). `bits` None: as they are. Only the rows that are looked up are quantised. `active` off
    gives the plain table. Input (...) int64, output (..., dim); index 0 looks up row `first`. `columns` gives factors
    per column (dim,), 0 for those that will be gone and that scales and blocks must not see.
    """

    kind: ClassVar[str] = "embedding"
    active: bool = True
    columns: Callable[[], Tensor] | None = None
    bits: int | None = 8
    block: int = 32
    first: int = 0

    @classmethod
    def of(cls, module: nn.Embedding, bits: int | None = 8, block: int = 32) -> CompressedEmbedding:
        """Take over an embedding, sharing its weight; itself, at these bits, if it is one."""
        if isinstance(module, cls):
            new = module
        else:
            with torch.device("meta"):
                new = cls(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
            new.weight = module.weight
            new.train(module.training)
        new.bits, new.block = bits, block
        return new

    def describe(self) -> dict[str, JSON]:
        """{"bits", "block"}, and "first" where it is not 0."""
        return {"bits": self.bits, "block": self.block} | ({"first": self.first} if self.first else {})

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> CompressedEmbedding:
        """In place of the plain table."""
        assert isinstance(old, nn.Embedding)
        bits, block, first = entry["bits"], entry["block"], entry.get("first", 0)
        assert isinstance(bits, int | None) and isinstance(block, int) and isinstance(first, int)
        new = cls.of(old, bits, block)
        new.first = first
        return new

    @torch.no_grad()
    def fold(self) -> None:
        """Drop the rows before `first`, which nothing looks up any more."""
        self.weight = nn.Parameter(self.weight[self.first :].clone(), requires_grad=self.weight.requires_grad)
        self.num_embeddings, self.first = len(self.weight), 0
        # It only says which row gets no gradient.
        self.padding_idx = None

    def restore(self) -> nn.Embedding:
        """The plain table with the same values."""
        with torch.device("meta"):
            new = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx)
        new.weight = self.weight
        return new.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        # The base looks up the rows that it was pretrained with.
        input = input + self.first if self.first and not is_bare() else input
        rows = F.embedding(input, self.weight, self.padding_idx)
        bits = self.bits
        if bits is None or not self.active or is_dense():
            return rows
        flat = rows.detach().reshape(-1, rows.shape[-1])
        live = None if self.columns is None else self.columns()
        rounded = on_live_columns(flat, live, lambda part: round_rows(part, bits, self.block))
        return straight_through(rows, rounded.view_as(rows))
