"""LayerMix: the softmax-weighted sum of all layers' outputs in place of the last one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compressft.modules.kinds import known
from compressft.modules.tap import Tap
from compressft.utils.texts import JSON

Normalise = Literal["none", "batch", "row"]
EPS = 1e-13


@known
class LayerMix(Tap):
    """gamma * sum_j softmax(w)_j h_j over layer outputs h_j, (B, T, d) (Peters et al. 2018, equation 1).

    Parameters: `weights` (number,) from 0, the plain mean; `gamma` () from 1. In pre-norm families the sum is what the
    final norm reads. `normalise`: each h_j first gets mean 0 and variance 1 over all elements of its real tokens,
    without affine: of the whole batch ("batch", ELMo's), or row by row ("row"), which does not let a row's result
    depend on its batch mates.

    Args:
        number: how many outputs are mixed: layers, and one more with `embeddings`.
        embeddings: whether the embeddings' output is the first of them.
    """

    kind: ClassVar[str] = "scalar_mix"
    above_norm = False

    def __init__(self, number: int, embeddings: bool, normalise: Normalise) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.normalise = normalise
        self.weights = nn.Parameter(torch.zeros(number))
        self.gamma = nn.Parameter(torch.ones(()))

    def describe(self) -> dict[str, JSON]:
        return {"number": len(self.weights), "embeddings": self.embeddings, "normalise": self.normalise}

    @property
    def wants(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.normalise == "none" else ("attention_mask",)

    def top(self, states: list[Tensor], last: Tensor, inputs: Mapping[str, object]) -> Tensor:
        mixed = [*states, last] if self.embeddings else [*states[1:], last]
        return self(mixed, inputs.get("attention_mask"))

    def forward(self, states: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Mix these (B, T, d) tensors; `mask` (B, T) marks paddings with 0 and matters to `normalise` alone."""
        if len(states) != len(self.weights):
            raise ValueError(f"scalar_mix: {len(states)} layers' outputs given, {len(self.weights)} weights")
        if self.normalise != "none":
            states = [self._normalised(state, mask) for state in states]
        shares = torch.softmax(self.weights, 0)
        total = shares[0] * states[0]
        for share, state in zip(shares[1:], states[1:], strict=True):
            total = total + share * state
        return self.gamma * total

    def _normalised(self, x: Tensor, mask: Tensor | None) -> Tensor:
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        dims = (0, 1, 2) if self.normalise == "batch" else (1, 2)
        number = real.sum(dims, keepdim=True) * x.shape[-1]
        mean = (x * real).sum(dims, keepdim=True) / number
        variance = ((x - mean) * real).square().sum(dims, keepdim=True) / number
        return (x - mean) * torch.rsqrt(variance + EPS)
