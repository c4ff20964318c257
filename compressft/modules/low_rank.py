"""Products of LoRA and DoRA layers in fewer passes over the output than the `peft` package's own forward makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from compressft.modules.tuner import BaseView


class LowRank(NamedTuple):
    """What a plain LoRA or DoRA layer of PEFT holds: W x + scale * up(down(x)), the sum times a magnitude in DoRA."""

    base: BaseView
    down: Tensor
    up: Tensor
    scale: float
    dropout: nn.Module
    magnitude: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), base and bias included.

        Hu et al. (2022), equation 3; Liu et al. (2024), equation 5 with the norm as a constant (section 4.3).
        """
        y = self.base(x)
        hidden = F.linear(self.dropout(x), self.down) * self.scale
        # The product adds itself to the base's output, without a tensor and a pass of its own.
        y = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), self.up.t()).view(y.shape)
        if self.magnitude is None:
            return y
        bias = self.base.bias
        # In bf16 the small difference from 1 keeps more of its digits than the factor would.
        norms = _row_norms(self.base.weight, self.down, self.up, self.scale)
        change = (self.magnitude / norms - 1.0).to(y.dtype)
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), change)


def _row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||W + scale * up @ down|| of each row, (out,), a constant for autograd."""
    with torch.no_grad(), torch.autocast(down.device.type, enabled=False):
        return torch.linalg.vector_norm(torch.addmm(weight, up, down, alpha=scale), dim=1)


def low_rank(tuner: nn.Module, x: Tensor) -> LowRank | None:
    """How to compute a tuner's product for `x`; None for one that only PEFT's own forward computes rightly."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant

    # A subclass may compute anything.
    if type(tuner) is not Linear or tuner.disable_adapters or tuner.merged or x.ndim < 2:
        return None
    names = tuner.active_adapters
    if len(names) != 1 or tuner.lora_bias[names[0]] or tuner.fan_in_fan_out:
        return None
    (name,) = names
    variant, dropout = tuner.lora_variant.get(name), tuner.lora_dropout[name]
    dora = type(variant) is DoraLinearVariant
    if variant is not None and not dora:
        return None
    # PEFT's DoRA drops the base's input too.
    if dora and tuner.training and not isinstance(dropout, nn.Identity):
        return None
    down, up = tuner.lora_A[name].get_parameter("weight"), tuner.lora_B[name].get_parameter("weight")
    # Without autocast PEFT computes in the tuner's own precision.
    if x.dtype != down.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    magnitude = tuner.lora_magnitude_vector[name].get_parameter("weight") if dora else None
    base: BaseView = tuner.__dict__["base_layer"]
    return LowRank(base, down, up, tuner.scaling[name], dropout, magnitude)
