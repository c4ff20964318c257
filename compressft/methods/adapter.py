"""Bottleneck adapters: small trained modules in every layer of a frozen model (Houlsby, Pfeiffer)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from compressft.anatomy import Layer, anatomy
from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.model import compress_linear, replace
from compressft.modules.bottleneck import AdaptedNorm, AdaptedOutput, Bottleneck
from compressft.transform import Context, Transform

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]


class Adapter(Transform):
    """Houlsby et al. (ICML 2019) or Pfeiffer et al. (EACL 2021).

    `houlsby`: h <- LN(A(sublayer(h)) + h) after attention and after the FFN, A(x) = x + W2 gelu_tanh(W1 x + b1) + b2,
    near-identity at initialisation; all LayerNorms and the head are trained too. `pfeiffer`: one adapter per layer
    after the FFN, out = LN(up(relu(down(LN(f + h)))) + f + h); LayerNorms stay frozen. In pre-norm families the
    LayerNorm steps vanish: f + up(act(down(f))) before the residual add.

    Fields: `size` is the bottleneck width r (default 64 for houlsby); `reduction_factor` gives r = d / factor instead
    (default 16 for pfeiffer).
    """

    type: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    size: int | None = Field(default=None, ge=1)
    reduction_factor: int | None = Field(default=None, ge=1)
    activation: Activation | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Adapter:
        if self.size is not None and self.reduction_factor is not None:
            raise ValueError("size and reduction_factor are both set; give one")
        return self

    def bottleneck_size(self, width: int) -> int:
        """r for a model of hidden size `width`."""
        if self.size is not None:
            return self.size
        factor = self.reduction_factor or (16 if self.placement == "pfeiffer" else None)
        if factor is None:
            return 64
        if width % factor:
            raise UserError(f"method.reduction_factor: {factor} does not divide the hidden size {width}")
        return width // factor

    def prepare(self, model: nn.Module, context: Context) -> None:
        Layers(top=0).prepare(model, context)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in anatomy(model).layers:
            if self.placement == "houlsby":
                self._after(model, layer, layer.family.attention_out, generator)
                self._after(model, layer, layer.family.ffn_out, generator)
            elif layer.family.ffn_norm is None:
                self._after(model, layer, layer.family.ffn_out, generator)
            else:
                norm = layer.part(layer.family.ffn_norm)
                assert isinstance(norm, nn.LayerNorm)
                path = f"{layer.name}.{layer.family.ffn_norm}"
                replace(model, path, AdaptedNorm.of(norm, self._bottleneck(layer, generator)))
        if self.placement == "houlsby":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                    module.requires_grad_(True)

    def _bottleneck(self, layer: Layer, generator: torch.Generator) -> Bottleneck:
        weight = layer.part(layer.family.down).weight
        assert isinstance(weight, nn.Parameter)
        width = weight.shape[1] if type(layer.part(layer.family.down)).__name__ == "Conv1D" else weight.shape[0]
        houlsby = self.placement == "houlsby"
        activation = self.activation or ("gelu_tanh" if houlsby else "relu")
        init = "houlsby" if houlsby else "bert"
        return Bottleneck(width, self.bottleneck_size(width), activation, init, generator).to(weight.device)

    def _after(self, model: nn.Module, layer: Layer, path: str, generator: torch.Generator) -> None:
        new = self._bottleneck(layer, generator)
        if path in layer.linears:
            compress_linear(model, f"{layer.name}.{path}").adapter = new
        else:
            replace(model, f"{layer.name}.{path}", AdaptedOutput(layer.part(path), new))
