"""Invertible adapter of MAD-X: an additive coupling after the embeddings, undone before the output embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from compressft_kernels import adapter as adapter_kernel
from torch import Tensor, nn

from compressft.modules.dtypes import like
from compressft.modules.families import FAMILIES
from compressft.modules.kinds import Extra, known
from compressft.modules.linear import is_bare
from compressft.modules.pretrained import pretrained
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INVERTIBLE = "invertible"


@known
class Invertible(Extra):
    """o1 = e1 + F(e2), o2 = e2 + G(o1), where (e1, e2) are the halves of a token's embedding (Dinh et al. 2015, NICE).

    F and G are Linear - activation - Linear, `size` wide inside (Pfeiffer et al., MAD-X, EMNLP 2020, section 3.2.2).
    The Jacobian's determinant is 1. Of an odd width the second half is the larger one.

    A child of the backbone; `attach` puts it behind the embeddings: behind their norm and dropout, where they have
    these, and before a projection to the layers' width. Models with an output embedding, masked and causal language
    models alike, have the `Inverse` in front of that; models of a task without one the forward direction alone.
    """

    kind: ClassVar[str] = "invertible"

    def __init__(
        self, width: int, size: int, activation: str, zero: bool = False, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.first = width // 2
        self.width = width
        with torch.device("meta"):
            self.f = nn.ModuleList([nn.Linear(width - self.first, size), nn.Linear(size, self.first)])
            self.g = nn.ModuleList([nn.Linear(self.first, size), nn.Linear(size, width - self.first)])
        self.to_empty(device="cpu")
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            for half in (self.f, self.g):
                for place, linear in enumerate(half):
                    assert isinstance(linear, nn.Linear)
                    nn.init.normal_(linear.weight, std=0.0 if zero and place else 0.02, generator=generator)
                    nn.init.zeros_(linear.bias)

    def describe(self) -> dict[str, JSON]:
        return {"width": self.width, "size": self.size, "activation": self.activation}

    @property
    def size(self) -> int:
        """Width inside."""
        return self.f[0].get_parameter("bias").shape[0]

    def attach(self, owner: PreTrainedModel) -> None:
        """Act on the embeddings of the backbone whose child this is."""
        family = FAMILIES[owner.config.model_type]
        if family.embeddings != family.embedding_tables:
            owner.get_submodule(family.embeddings[0]).register_forward_hook(self._on_output)
        else:
            # No module sums the tables, and passes replace tables.
            owner.get_submodule(f"{family.layers}.0").register_forward_pre_hook(self._on_layer, with_kwargs=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        e1, e2 = x.split([self.first, self.width - self.first], -1)
        o1 = self._add(self.f, e2, e1, 1.0)
        return torch.cat([o1, self._add(self.g, o1, e2, 1.0)], -1)

    def inverse(self, x: Tensor) -> Tensor:
        """Undo `forward`."""
        o1, o2 = x.split([self.first, self.width - self.first], -1)
        e2 = self._add(self.g, o1, o2, -1.0)
        return torch.cat([self._add(self.f, e2, o1, -1.0), e2], -1)

    def _add(self, layers: nn.ModuleList, x: Tensor, residual: Tensor, scale: float) -> Tensor:
        down, up = layers
        assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
        return adapter_kernel(
            x.contiguous(), *like(x, down.weight, down.bias, up.weight, up.bias),
            activation=self.activation, residual=residual, scale=scale,
        )  # fmt: skip

    def _on_output(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return None if is_bare() else self(output)

    def _on_layer(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        if is_bare():
            return None
        if args:
            return (self(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self(kwargs["hidden_states"])}


@known
class Inverse(Extra):
    """Undoes the Invertible of a model's backbone before its output embedding. No tensors; a child of the model."""

    kind: ClassVar[str] = "inverse"
    # In a tuple, so that the model is not registered inside itself.
    model: tuple[PreTrainedModel]

    def attach(self, owner: PreTrainedModel) -> None:
        """Act on the output embedding of the model whose child this is."""
        self.model = (owner,)
        embedding = owner.get_output_embeddings()
        assert embedding is not None
        embedding.register_forward_pre_hook(self._on_logits)

    def _on_logits(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if is_bare():
            return None
        coupling: Invertible = getattr(self.model[0].base_model, INVERTIBLE)
        return coupling.inverse(args[0]), *args[1:]


def add_invertible(model: PreTrainedModel, new: Invertible) -> None:
    """Put `new` into a model's backbone, and its inverse into the model where that has an output embedding."""
    backbone = pretrained(model.base_model)
    backbone.add_module(INVERTIBLE, new)
    new.attach(backbone)
    if model.get_output_embeddings() is not None:
        inverse = Inverse()
        model.add_module("inverse", inverse)
        inverse.attach(model)
