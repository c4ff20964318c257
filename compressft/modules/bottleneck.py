"""Bottleneck adapters (Houlsby, Pfeiffer) as modules over the `adapter` kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from compressft_kernels import adapter as adapter_kernel
from torch import Tensor, nn

from compressft.modules.kinds import Extra, known
from compressft.modules.linear import is_bare


@known
class Bottleneck(Extra):
    """y = residual + up(act(down(x))); x (..., d), `down_weight` (r, d), `up_weight` (d, r).

    Houlsby et al. (2019), section 2.1. `init` "houlsby" draws both matrices from a normal of std 1e-3 truncated at two
    standard deviations (near-identity); "bert" from N(0, 0.02) (Pfeiffer et al. 2021); biases start at 0.
    """

    kind: ClassVar[str] = "bottleneck"

    def __init__(self, width: int, size: int, activation: str, init: str, generator: torch.Generator) -> None:
        super().__init__()
        self.activation = activation
        self.down_weight = nn.Parameter(torch.empty(size, width))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_weight = nn.Parameter(torch.empty(width, size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        for weight in (self.down_weight, self.up_weight):
            if init == "houlsby":
                # PyTorch's truncation bounds are absolute values, not standard deviations.
                nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)

    def describe(self) -> dict[str, Any]:
        size, width = self.down_weight.shape
        return {"width": width, "size": size, "activation": self.activation}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: dict[str, Any]) -> Bottleneck:
        return cls(**entry, init="bert", generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual` defaults to x."""
        return adapter_kernel(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            activation=self.activation,
            residual=x if residual is None else residual,
        )


@known
class AdaptedOutput(nn.Module):
    """A module (dropout or projection) followed by a bottleneck: Houlsby's place, before the residual add."""

    kind: ClassVar[str] = "adapted_output"
    adapter: nn.Module

    def __init__(self, inner: nn.Module, adapter: nn.Module | None) -> None:
        super().__init__()
        self.inner = inner
        if adapter is not None:
            self.adapter = adapter

    def describe(self) -> dict[str, Any]:
        """Nothing: what it wraps and its adapter speak for themselves."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: dict[str, Any]) -> AdaptedOutput:
        """Around what stands there; the adapter follows."""
        assert old is not None
        return cls(old, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if is_bare() else self.adapter(y)


@known
class AdaptedNorm(nn.LayerNorm):
    """Pfeiffer's place in a post-norm block: out = LN(z + up(act(down(LN(z))))) with z = FFN(h) + h.

    The one pretrained LayerNorm is applied twice; its parameters keep their names.
    """

    kind: ClassVar[str] = "adapted_norm"
    adapter: nn.Module

    @classmethod
    def of(cls, norm: nn.LayerNorm, adapter: nn.Module | None) -> AdaptedNorm:
        """Share the parameters of `norm`."""
        with torch.device("meta"):
            new = cls(norm.normalized_shape, eps=norm.eps)  # type: ignore[arg-type]
        new.weight, new.bias = norm.weight, norm.bias
        if adapter is not None:
            new.adapter = adapter
        return new

    def describe(self) -> dict[str, Any]:
        """Nothing: its adapter speaks for itself."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: dict[str, Any]) -> AdaptedNorm:
        """In place of the LayerNorm; the adapter follows."""
        assert isinstance(old, nn.LayerNorm)
        return cls.of(old, None)

    def forward(self, input: Tensor) -> Tensor:
        normed = super().forward(input)
        return normed if is_bare() else super().forward(self.adapter(normed, residual=input))
