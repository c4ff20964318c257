"""Dropout for CPU training: a random byte an element, where torch draws a double."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 256
# With fewer levels dropped, how many a call drops would vary too much from call to call.
LEAST = 4


def drop(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout`: 0 with probability p, else x / (1 - p); shape and dtype of x, any floating one.

    On CPU an element is dropped where its byte is one of the lowest k of 256 levels. k is drawn for each call from the
    two integers next to 256 p, so that each element's probability is p to the last digit. The byte is what is kept for
    the backward pass, as torch keeps one for its mask. All draws come from torch's generator.
    """
    if not training or p == 0.0:
        return x
    if not _by_bytes(x, p):
        return F.dropout(x, p)
    return _Drop.apply(x, p)  # type: ignore[return-value]


class Dropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        return drop(input, self.p, self.training)


def quicken(model: nn.Module) -> None:
    """Make every `nn.Dropout` of a model draw bytes; paths, hooks and saved tensors stay what they are."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout


def _by_bytes(x: Tensor, p: float) -> bool:
    few = LEAST / LEVELS <= p <= 1.0 - LEAST / LEVELS
    return few and x.device.type == "cpu" and x.is_floating_point() and not torch.compiler.is_compiling()


class _Drop(torch.autograd.Function):
    """Where the byte is above the threshold: x / (1 - p), else 0."""

    @staticmethod
    def forward(ctx, x, p):
        number = x.numel()
        words = torch.empty((number + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int8)[:number].view(x.shape)
        few = int(LEVELS * p)
        few += int(torch.rand(()) < LEVELS * p - few)
        # Levels go from -128 to 127.
        ctx.threshold, ctx.factor = few - LEVELS // 2 - 1, 1.0 / (1.0 - p)
        ctx.save_for_backward(levels)
        return _above(x, levels, ctx.threshold).mul_(ctx.factor)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (levels,) = ctx.saved_tensors
        return _above(grad, levels, ctx.threshold) * ctx.factor, None


def _above(values: Tensor, levels: Tensor, threshold: int) -> Tensor:
    """The values where the level is above the threshold, else 0; no other masking is vectorised for every dtype."""
    return torch.ops.aten.threshold_backward(values, levels.to(values.dtype), threshold)
