"""Bottleneck adapters: small trained modules in every layer of a frozen model (Houlsby, Pfeiffer, parallel, MAD-X)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.places import as_saved
from compressft.model.anatomy import Layer, anatomy, linear_shape, refuse_pairs
from compressft.model.saved.adapters import read_adapters
from compressft.model.surgery import put_after, put_after_ffn
from compressft.modules.bottleneck import Bottleneck, BottleneckDesign, Parallel
from compressft.modules.invertible import INVERTIBLE, Invertible, add_invertible
from compressft.modules.pretrained import pretrained
from compressft.transform import Context, Resource, Transform, Want

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
Init = Literal["houlsby", "bert", "zero"]
# Per placement: activation, initialisation, scale, and the size or else the reduction factor.
DEFAULTS: dict[str, tuple[Activation, Init, float, int | None, int | None]] = {
    "houlsby": ("gelu_tanh", "houlsby", 1.0, 64, None),
    "pfeiffer": ("relu", "bert", 1.0, None, 16),
    "parallel": ("relu", "zero", 4.0, None, 2),
}
# Widths of the halves over width inside the invertible adapter's two networks.
COUPLING_REDUCTION = 2


class Adapter(Transform):
    """Houlsby et al. (ICML 2019), Pfeiffer et al. (EACL 2021), He et al. (ICLR 2022), or MAD-X (EMNLP 2020).

    `houlsby`: h <- LN(A(sublayer(h)) + h) after attention and after the FFN, A(x) = x + W2 gelu_tanh(W1 x + b1) + b2,
    near-identity at initialisation; all LayerNorms and the head are trained too. `pfeiffer`: one adapter per layer
    after the FFN, out = LN(up(relu(down(LN(f + h)))) + f + h); LayerNorms stay frozen. In pre-norm families the
    LayerNorm steps vanish: f + up(act(down(f))) before the residual add. `parallel`: next to the FFN,
    ffn(x) + 4 up(relu(down(x))), x what the FFN reads; exactly the identity at initialisation.

    Fields: `size` is the bottleneck width r (default 64 for houlsby); `reduction_factor` gives r = d / factor instead
    (default 16 for pfeiffer, 2 for parallel). `activation`, `init` ("houlsby", "bert", "zero") and `scale` default to
    the placement's. `stack`: delta/ folders of runs with placement pfeiffer, from the bottom up; their adapters lie
    frozen below the new one (a task adapter on a language adapter), their invertible adapter too. `invertible`: train
    an invertible adapter after the embeddings as well, its inverse in front of an output embedding (a language
    adapter). Adapters that an earlier stage left in a place stay there, frozen, below the new one.
    """

    type: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    size: int | None = Field(default=None, ge=1)
    reduction_factor: int | None = Field(default=None, ge=1)
    activation: Activation | None = None
    init: Init | None = None
    scale: float | None = Field(default=None, gt=0)
    stack: tuple[str, ...] = ()
    invertible: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        if self.size is not None and self.reduction_factor is not None:
            raise ValueError("size and reduction_factor are both set; give one")
        if self.stack and self.placement != "pfeiffer":
            raise ValueError(f"stack lies in Pfeiffer's place, placement is {self.placement!r}; set it to 'pfeiffer'")
        return self

    def bottleneck_size(self, width: int) -> int:
        """r for a model of hidden size `width`."""
        *_, size, factor = DEFAULTS[self.placement]
        if self.size is not None or (self.reduction_factor is None and size is not None):
            return self.size or size or 0
        factor = self.reduction_factor or factor or 1
        if width % factor:
            raise UserError(f"method.reduction_factor: {factor} does not divide the hidden size {width}")
        return width // factor

    def prepare(self, model: nn.Module, context: Context) -> None:
        if self.stack or self.invertible:
            refuse_pairs(model, "method adapter.stack and invertible")
        saved = read_adapters(model, self.stack, "method adapter.stack")
        couplings = [one for one in saved if one.invertible is not None]
        self._check_invertible(model, len(couplings), context)
        Layers(top=0).prepare(model, context)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in anatomy(model).layers:
            device = layer.part(layer.family.down).weight.device
            for one in saved:
                for below in one.layers[layer.index]:
                    put_after_ffn(model, layer, below.to(device))  # type: ignore[arg-type]
            new = self._bottleneck(layer, generator)
            if self.placement == "houlsby":
                put_after(model, layer, layer.family.attention_out, new)
                put_after(model, layer, layer.family.ffn_out, self._bottleneck(layer, generator))
            elif self.placement == "pfeiffer":
                put_after_ffn(model, layer, new)
            else:
                assert isinstance(new, Parallel)
                layer.module.add_module("parallel", new.beside(layer.family))
                new.attach(layer.module)
        if self.placement == "houlsby":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
                    # Its own parameters: an adapter of an earlier stage may sit inside it.
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(True)
        for one in couplings:
            assert one.invertible is not None
            add_invertible(pretrained(model), one.invertible.to(next(model.parameters()).device))
        if self.invertible:
            add_invertible(pretrained(model), self._coupling(model, generator))

    def _check_invertible(self, model: nn.Module, saved: int, context: Context) -> None:
        parts = anatomy(model)
        present = saved + int(self.invertible) + int(hasattr(parts.backbone, INVERTIBLE))
        if present > 1:
            raise UserError(
                "method adapter.invertible: there can be one invertible adapter; an adapter in method.stack, or an "
                "earlier stage, has one already"
            )
        if self.placement == "parallel" and any(hasattr(layer.module, "parallel") for layer in parts.layers):
            raise UserError("method adapter.placement: an earlier stage put parallel adapters there; use pfeiffer")
        drops = [one.type for one in context.transforms for its in one.alters() if its.resource is Resource.LAYERS]
        if present and drops and parts.family.embeddings == parts.family.embedding_tables:
            raise UserError(
                f"method adapter.invertible: sits in front of the first layer, which {drops[0]!r} may remove; "
                "remove layers in an earlier stage"
            )

    def _bottleneck(self, layer: Layer, generator: torch.Generator) -> Bottleneck | Parallel:
        down = layer.part(layer.family.down)
        width = linear_shape(down)[1]
        activation, init, scale, *_ = DEFAULTS[self.placement]
        kind = Parallel if self.placement == "parallel" else Bottleneck
        design = BottleneckDesign(
            width,
            self.bottleneck_size(width),
            self.activation or activation,
            scale if self.scale is None else self.scale,
        )
        new = kind(design, self.init or init, generator)
        return new.to(down.weight.device)  # type: ignore[arg-type]

    def _coupling(self, model: nn.Module, generator: torch.Generator) -> Invertible:
        table = model.get_input_embeddings()  # type: ignore[operator]
        width = table.embedding_dim
        activation, init, *_ = DEFAULTS[self.placement]
        size = max(width // 2 // COUPLING_REDUCTION, 1)
        zero = (self.init or init) == "zero"
        new = Invertible(width, size, self.activation or activation, zero, generator)
        return new.to(table.weight.device)

    def inputs(self) -> Sequence[str]:
        return self.stack

    def wants(self) -> Sequence[Want]:
        return as_saved("stack") if self.stack else ()
