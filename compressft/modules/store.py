"""Storage of a frozen weight in 4-bit NormalFloat: what a linear layer holds instead of its fp32 tensor."""

from __future__ import annotations

import torch
from compressft_kernels import NF4
from compressft_kernels.nf4 import dense
from torch import Tensor, nn

# Scales per second-level block, as the kernels read them.
SECOND = 256


class NF4Store(nn.Module):
    """A weight (out, in) in NF4 with blocks of 64 (Dettmers et al. 2023, "QLoRA", section 3).

    Buffers: `packed` uint8 (out * in / 2,), `absmax`, `code`; with double quantisation `absmax` is uint8 and `absmax2`,
    `code2`, `offset` scale it: 0.516 instead of 0.5625 bytes a weight. The second level uses 256 evenly spaced codes.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor

    def __init__(self, weight: Tensor, double: bool = True) -> None:
        super().__init__()
        quantised = NF4.quantise(weight)
        self.shape = quantised.shape
        nested = double_quantise(quantised.absmax) if double else None
        self.register_buffer("packed", quantised.packed)
        self.register_buffer("absmax", nested[0] if nested else quantised.absmax)
        self.register_buffer("code", quantised.code)
        for name, value in zip(("absmax2", "code2", "offset"), nested[1:] if nested else (None,) * 3, strict=True):
            self.register_buffer(name, value)

    @property
    def nf4(self) -> NF4:
        """As the kernels take it."""
        nested = None if self.absmax2 is None else (self.absmax2, self.code2, self.offset)
        return NF4(self.packed, self.absmax, self.code, self.shape, nested)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        """The weight that the codes stand for, fp32 (out, in)."""
        return dense(self.nf4, torch.float32)


def double_quantise(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scales (blocks,) fp32 -> (uint8 codes, fp32 scale per 256 of them, the 256 codes, offset)."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(absmax) % SECOND)).view(-1, SECOND)
    absmax2 = padded.abs().amax(1)
    code2 = torch.linspace(-1.0, 1.0, 256, device=absmax.device)
    scaled = padded / absmax2.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    place = torch.round((scaled + 1.0) * 127.5).flatten()[: len(absmax)]
    return place.to(torch.uint8), absmax2, code2, offset
