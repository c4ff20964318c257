"""AdapterFusion: an attention over the outputs of several frozen adapters, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from compressft_kernels.reference.bottleneck import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.bottleneck import Bottleneck
from compressft.modules.dropout import drop
from compressft.modules.kinds import Extra, known
from compressft.utils.texts import JSON


@known
class AdapterFusion(Extra):
    """y = residual + W_v sum_n p_n z_n, p = softmax_n(Q . K_n / temperature) (Pfeiffer et al., EACL 2021, section 3.2).

    z_n = up_n(act(down_n(x))) is adapter n's output without its residual, Q = W_q x + b_q, K_n = W_k z_n + b_k; the
    products are not scaled, dropout acts on them, before the softmax. The N adapters lie side by side, so that one
    product computes all of their hidden values; z_n itself is never stored, because
    Q . K_n = (up_n^T W_k^T Q) . act(down_n(x)) + ..., and one product with the side-by-side up-projections mixes them.

    Parameters: `query_weight`, `key_weight`, `value_weight` (d, d) and `query_bias`, `key_bias` (d,) of the attention;
    the adapters', frozen: `down_weight` (sum r, d), `down_bias` (sum r,), `up_weight` (d, sum r), `up_bias` (N, d).
    W_q and W_k start from N(0, 0.02), W_v from 1 on the diagonal and 1e-6 elsewhere, biases from 0.
    Buffer `temperature` (), not saved: 1 in a finished model.

    Args:
        sizes: the adapters' bottleneck sizes r, in their order.
        dropout: probability.
    """

    kind: ClassVar[str] = "fusion"
    temperature: Tensor
    place: Tensor

    def __init__(
        self,
        width: int,
        sizes: Sequence[int],
        activation: str,
        dropout: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.activation = activation
        self.dropout = dropout
        self.annealed = False
        total = sum(sizes)
        generator = generator or torch.Generator().manual_seed(0)
        self.query_weight = nn.Parameter(nn.init.normal_(torch.empty(width, width), std=0.02, generator=generator))
        self.query_bias = nn.Parameter(torch.zeros(width))
        self.key_weight = nn.Parameter(nn.init.normal_(torch.empty(width, width), std=0.02, generator=generator))
        self.key_bias = nn.Parameter(torch.zeros(width))
        self.value_weight = nn.Parameter(torch.full((width, width), 1e-6).fill_diagonal_(1.0))
        self.down_weight = nn.Parameter(torch.zeros(total, width), requires_grad=False)
        self.down_bias = nn.Parameter(torch.zeros(total), requires_grad=False)
        self.up_weight = nn.Parameter(torch.zeros(width, total), requires_grad=False)
        self.up_bias = nn.Parameter(torch.zeros(len(sizes), width), requires_grad=False)
        self.register_buffer("temperature", torch.ones(()), persistent=False)
        # Which adapter each hidden value belongs to.
        place = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(self.sizes), output_size=total)
        self.register_buffer("place", place, persistent=False)

    @classmethod
    def of(cls, adapters: Sequence[Bottleneck], dropout: float, generator: torch.Generator) -> AdapterFusion:
        """Over copies of these adapters, which have one activation."""
        width = adapters[0].down_weight.shape[1]
        sizes = [len(adapter.down_bias) for adapter in adapters]
        new = cls(width, sizes, adapters[0].activation, dropout, generator)
        with torch.no_grad():
            new.down_weight.copy_(torch.cat([adapter.down_weight for adapter in adapters]))
            new.down_bias.copy_(torch.cat([adapter.down_bias for adapter in adapters]))
            new.up_weight.copy_(torch.cat([adapter.up_weight for adapter in adapters], 1))
            new.up_bias.copy_(torch.stack([adapter.up_bias for adapter in adapters]))
        return new

    def describe(self) -> dict[str, JSON]:
        return {
            "width": len(self.query_bias),
            "sizes": [*self.sizes],
            "activation": self.activation,
            "dropout": self.dropout,
        }

    def penalty(self) -> Tensor:
        """||I - W_v||_F^2."""
        identity = torch.eye(len(self.value_weight), device=self.value_weight.device)
        return (identity - self.value_weight).square().sum()

    def shares(self, x: Tensor) -> Tensor:
        """p for x (..., d): (..., N), adding up to 1."""
        return self._attend(x, self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](F.linear(x, self.down_weight, self.down_bias))

    def _attend(self, x: Tensor, hidden: Tensor) -> Tensor:
        query = F.linear(x, self.query_weight, self.query_bias)
        key = F.linear(query, self.key_weight.t())
        products = hidden * F.linear(key, self.up_weight.t())
        scores = torch.stack([part.sum(-1) for part in products.split(self.sizes, -1)], -1)
        # The bias b_k adds the same to every score; behind dropout that is no longer nothing.
        scores = scores + F.linear(key, self.up_bias) + (query * self.key_bias).sum(-1, keepdim=True)
        scores = drop(scores, self.dropout, self.training)
        if self.annealed:
            scores = scores / self.temperature
        return torch.softmax(scores, -1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d); `residual` defaults to x."""
        hidden = self._hidden(x)
        shares = self._attend(x, hidden)
        mixed = F.linear(hidden * shares[..., self.place], self.up_weight) + F.linear(shares, self.up_bias.t())
        return (x if residual is None else residual) + F.linear(mixed, self.value_weight)
