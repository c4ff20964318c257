"""The `gate` slot: a structured 0/1 mask over groups of input columns, with the score that decides it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ColumnGate(nn.Module):
    """Groups of `size` adjacent input columns that are kept (1) or dropped (0) together: a head's, or one neuron's.

    Buffers: `mask` (groups,) fp32 0/1 and `importance` (groups,) fp32. While `measure()` is on, `mask` collects the
    gradient of the loss with respect to itself: the first-order importance of Michel et al. (2019), equation 2, which
    is also the movement score of Sanh et al. (2020) summed over the group. A dropped group still gets a gradient, so it
    may return. `mask` is a buffer, not a parameter: no optimiser and no gradient clipping sees it.
    """

    mask: Tensor
    importance: Tensor

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mask", torch.ones(groups))
        self.register_buffer("importance", torch.zeros(groups))

    def measure(self, on: bool) -> None:
        """Collect (or stop collecting) gradients of the mask."""
        self.mask.requires_grad_(on)
        if not on:
            self.mask.grad = None

    def columns(self) -> Tensor:
        """The mask per input column, (groups * size,)."""
        return self.mask if self.size == 1 else self.mask.repeat_interleave(self.size)

    @torch.no_grad()
    def accumulate(self, momentum: float) -> None:
        """Move `importance` towards the newest |gradient| and forget the gradient; nothing where there is none."""
        if self.mask.grad is not None:
            score = self.mask.grad.detach().abs()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(score)
            # fp16 loss scaling skips steps whose gradients overflow; so does the average.
            if torch.isfinite(score).all():
                self.importance.mul_(momentum).add_(score * (1.0 - momentum))
            self.mask.grad = None

    @torch.no_grad()
    def keep(self, groups: Tensor) -> None:
        """Keep exactly these group indices."""
        self.mask.zero_()
        self.mask[groups] = 1.0
