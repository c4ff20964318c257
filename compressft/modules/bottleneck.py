"""Bottleneck adapters (Houlsby, Pfeiffer, parallel) and stacks of them, as modules over the `adapter` kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from compressft_kernels import adapter as adapter_kernel
from compressft_kernels.reference.bottleneck import Norm
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.modules.dtypes import like
from compressft.modules.families import Family
from compressft.modules.kinds import Extra, built, known
from compressft.modules.linear import is_bare
from compressft.utils.texts import JSON


@dataclass(frozen=True)
class BottleneckDesign:
    """What a bottleneck is made of: d, the `size` inside, the activation's name, and the factor on what it adds."""

    width: int
    size: int
    activation: str
    scale: float = 1.0


class BottleneckLayers(Extra):
    """Base: y = residual + scale * up(act(down(x))); x (..., d), `down_weight` (r, d), `up_weight` (d, r).

    Houlsby et al. (2019), section 2.1. `init` "houlsby" draws both matrices from a normal of std 1e-3 truncated at two
    standard deviations (near-identity); "bert" from N(0, 0.02) (Pfeiffer et al. 2021); "zero" draws `down_weight` from
    U(-1/sqrt(d), 1/sqrt(d)) and leaves `up_weight` 0, which is the identity (He et al. 2022); biases start at 0.
    """

    def __init__(self, design: BottleneckDesign, init: str, generator: torch.Generator) -> None:
        super().__init__()
        self.activation = design.activation
        self.scale = design.scale
        width, size = design.width, design.size
        self.down_weight = nn.Parameter(torch.empty(size, width))
        self.down_bias = nn.Parameter(torch.zeros(size))
        self.up_weight = nn.Parameter(torch.empty(width, size))
        self.up_bias = nn.Parameter(torch.zeros(width))
        if init == "zero":
            nn.init.uniform_(self.down_weight, -(width**-0.5), width**-0.5, generator=generator)
            nn.init.zeros_(self.up_weight)
            return
        for weight in (self.down_weight, self.up_weight):
            if init == "houlsby":
                # PyTorch's truncation bounds are absolute values, not standard deviations.
                nn.init.trunc_normal_(weight, std=1e-3, a=-2e-3, b=2e-3, generator=generator)
            else:
                nn.init.normal_(weight, std=0.02, generator=generator)

    def describe(self) -> dict[str, JSON]:
        size, width = self.down_weight.shape
        scale: dict[str, JSON] = {} if self.scale == 1.0 else {"scale": self.scale}
        return {"width": width, "size": size, "activation": self.activation, **scale}

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        """`residual` defaults to x; `norm`: gamma, beta and eps of a LayerNorm between x and the first projection."""
        return adapter_kernel(
            x,
            *like(x, self.down_weight, self.down_bias, self.up_weight, self.up_bias),
            activation=self.activation,
            scale=self.scale,
            residual=x if residual is None else residual,
            norm=norm,
        )


@known
class Bottleneck(BottleneckLayers):
    """A bottleneck on the output of a module, or inside a norm."""

    kind: ClassVar[str] = "bottleneck"

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> Bottleneck:
        return cls(built(BottleneckDesign, entry), "bert", torch.Generator().manual_seed(0))


@known
class Parallel(BottleneckLayers):
    """A bottleneck next to an FFN: ffn(x) + scale * up(act(down(x))), x what the FFN reads (He et al. 2022, table 3).

    A child of its layer, made for it by `beside`; `attach` puts it to work. In post-norm layers x is also the
    residual.
    """

    kind: ClassVar[str] = "parallel"
    # Paths, in the layer, of the modules that hold the FFN's first and last projection.
    reads: str
    writes: str

    def beside(self, family: Family) -> Parallel:
        """Meant for a layer of this family; returns itself.

        Raises:
            UserError: the layer has no module of its own for its FFN.
        """
        self.reads, self.writes = family.up[0].rpartition(".")[0], family.down.rpartition(".")[0]
        if not self.reads:
            raise UserError("method adapter.placement: 'parallel' wants an FFN that is a module; take 'pfeiffer' here")
        return self

    def describe(self) -> dict[str, JSON]:
        return {**super().describe(), "reads": self.reads, "writes": self.writes}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> Parallel:
        return built(cls._again, entry)

    @classmethod
    def _again(cls, reads: str, writes: str, **arguments: JSON) -> Parallel:
        new = cls(built(BottleneckDesign, arguments), "zero", torch.Generator().manual_seed(0))
        new.reads, new.writes = reads, writes
        return new

    def attach(self, owner: nn.Module) -> None:
        """Act on the FFN of the layer whose child this is."""
        if self.reads == self.writes:
            owner.get_submodule(self.writes).register_forward_hook(self._on_ffn)
        else:
            # BERT's second half is given x as its residual, and adds the two before its LayerNorm.
            owner.get_submodule(self.writes).register_forward_pre_hook(self._on_residual)

    def _on_ffn(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return None if is_bare() else self(args[0], residual=output)

    def _on_residual(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if is_bare() else (args[0], self(args[1]), *args[2:])


@known
class Stack(Extra):
    """Adapters one on top of the other (Pfeiffer et al., MAD-X, EMNLP 2020): each reads what the one below wrote."""

    kind: ClassVar[str] = "stack"

    def __init__(self, *adapters: nn.Module) -> None:
        super().__init__()
        for place, adapter in enumerate(adapters):
            self.add_module(str(place), adapter)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        for adapter in self.children():
            x = adapter(x)
        return x


def links(adapter: nn.Module) -> list[nn.Module]:
    """The adapters of a Stack from the bottom up; of anything else, itself."""
    return list(adapter.children()) if isinstance(adapter, Stack) else [adapter]


def on_top(below: nn.Module | None, new: nn.Module) -> nn.Module:
    """`new` on top of what stands there, if anything does."""
    return new if below is None else Stack(*links(below), new)


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

    def describe(self) -> dict[str, JSON]:
        """Nothing: what it wraps and its adapter speak for themselves."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> AdaptedOutput:
        """Around what stands there; the adapter follows."""
        assert old is not None
        return cls(old, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if is_bare() else self.adapter(y)


@known
class AdaptedNorm(nn.LayerNorm):
    """Pfeiffer's place in a post-norm block: out = LN(z + up(act(down(LN(z))))) with z = FFN(h) + h.

    The one pretrained LayerNorm is applied twice, and once more for every further adapter of a stack; its parameters
    keep their names.
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

    def describe(self) -> dict[str, JSON]:
        """Nothing: its adapter speaks for itself."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> AdaptedNorm:
        """In place of the LayerNorm; the adapter follows."""
        assert isinstance(old, nn.LayerNorm)
        return cls.of(old, None)

    def forward(self, input: Tensor) -> Tensor:
        if not is_bare():
            for adapter in links(self.adapter):
                if isinstance(adapter, Bottleneck):
                    # In one kernel where there is one, which keeps LN(z) for nobody.
                    input = adapter(input, norm=(self.weight, self.bias, self.eps))
                else:
                    input = adapter(super().forward(input), residual=input)
        return super().forward(input)
