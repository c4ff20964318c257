"""CompressedEmbedding: an embedding table whose rows are int8 with one scale each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.linear import is_dense
from compressft.modules.quantizer import quantise_weight, weight_scale


class CompressedEmbedding(nn.Embedding):
    """Lookup of fake-quantised rows (s8, scale = max|row| / 127, straight-through gradient).

    Only the rows that are looked up are quantised. `active` off gives the plain table. Input (...) int64, output
    (..., dim).
    """

    active: bool = True

    @classmethod
    def of(cls, module: nn.Embedding) -> CompressedEmbedding:
        """Take over an embedding, sharing its weight; itself if it is one."""
        if isinstance(module, cls):
            return module
        with torch.device("meta"):
            new = cls(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx)
        new.weight = module.weight
        new.train(module.training)
        return new

    def forward(self, input: Tensor) -> Tensor:
        rows = F.embedding(input, self.weight, self.padding_idx)
        if not self.active or is_dense():
            return rows
        flat = rows.detach().reshape(-1, rows.shape[-1])
        scale = weight_scale(flat)
        quantised = (quantise_weight(flat, scale) * scale[:, None]).view_as(rows)
        return rows + (quantised - rows).detach() if rows.requires_grad else quantised
