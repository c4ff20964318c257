"""4-bit NormalFloat weights in bitsandbytes' layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
# Quantiles of a normal distribution scaled to [-1, 1] (Dettmers et al., "QLoRA", 2023, appendix E).
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """A weight of `shape` (out, in): weight = code[index] * scale of its block of 64 in row-major order.

    packed: uint8, out * in / 2 bytes in any shape; the earlier of two weights lies in the upper half of its byte.
    absmax: the blocks' scales, (ceil(out * in / 64),) float32; uint8 where `nested` is given.
    code: (16,) float32.
    nested: double quantisation, (absmax2, code2, offset): scale = code2[absmax] * absmax2[block // 256] + offset.

    Source: Dettmers et al., "QLoRA" (2023), sections 3 and appendix E; the layout is bitsandbytes'.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    nested: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        count = self.shape[0] * self.shape[1]
        blocks = -(-count // BLOCK)
        fits = self.packed.dtype == torch.uint8 and self.packed.numel() * 2 == count and self.packed.is_contiguous()
        fits = fits and self.absmax.shape == (blocks,) and self.code.shape == (16,)
        if not fits or (self.absmax.dtype == torch.uint8) != (self.nested is not None):
            raise ValueError(
                f"NF4: packed {tuple(self.packed.shape)} {self.packed.dtype}, absmax {tuple(self.absmax.shape)} "
                f"{self.absmax.dtype} and code {tuple(self.code.shape)} do not fit a weight of {self.shape}; want "
                f"{count // 2} bytes of uint8, {blocks} scales (uint8 with nested ones, else float32), 16 codes"
            )

    @classmethod
    def of(cls, parameter: Tensor) -> NF4:
        """From a bitsandbytes `Params4bit` that has been quantised.

        Raises:
            ValueError: not quantised yet, or in blocks of another size than 64.
        """
        state = getattr(parameter, "quant_state", None)
        if state is None:
            raise ValueError("NF4.of: the parameter has no quant_state; move the layer to its device first")
        if state.blocksize != BLOCK:
            raise ValueError(f"NF4.of: blocks of {state.blocksize} weights; the kernels read blocks of {BLOCK}")
        nested = None
        if state.nested:
            nested = (state.state2.absmax, state.state2.code, state.offset)
        return cls(parameter.data, state.absmax, state.code, tuple(state.shape), nested)

    @classmethod
    def quantise(cls, weight: Tensor) -> NF4:
        """Quantise a weight (out, in) to the nearest codes; out * in is even."""
        flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        absmax = flat.abs().amax(1)
        code = torch.tensor(NF4_CODE, device=weight.device)
        scaled = flat / absmax.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        place = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).flatten()[: weight.numel()].to(torch.uint8)
        packed = (place[0::2] << 4) | place[1::2]
        return cls(packed, absmax, code, (weight.shape[0], weight.shape[1]))

    def tables(self) -> list[Tensor]:
        """What the kernels read besides `packed`: [absmax, code] or [absmax, code, absmax2, code2, offset]."""
        return [self.absmax, self.code, *(self.nested or ())]


def dequantise(packed: Tensor, tables: list[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of `NF4.packed` and `NF4.tables()`, multiplied in float32 and rounded to dtype."""
    absmax, code, *nested = tables
    if nested:
        absmax2, code2, offset = nested
        second = absmax2.repeat_interleave(256)[: absmax.numel()]
        absmax = code2[absmax.long()] * second + offset
    # A byte looks up its two weights at once; shifting uint8 is slower, and torch's ONNX export translates it wrongly.
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    value = F.embedding(packed.flatten().int(), pairs).flatten()
    if value.numel() % BLOCK:
        return (value * absmax.repeat_interleave(BLOCK)[: value.numel()]).view(shape).to(dtype)
    return value.view(-1, BLOCK).mul_(absmax.unsqueeze(1)).view(shape).to(dtype)


def dense(weight: Tensor | NF4, dtype: torch.dtype) -> Tensor:
    """The weight itself, or what an NF4 one stands for in dtype."""
    return weight if isinstance(weight, Tensor) else dequantise(weight.packed, weight.tables(), weight.shape, dtype)
