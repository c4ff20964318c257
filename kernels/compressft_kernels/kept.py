"""What an autograd function's `ctx` is to its two passes, for the type checker."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Kept(Protocol):
    """What torch has for every function; each declares what it keeps besides, and its `saved_tensors`."""

    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep these for the backward pass."""

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """These outputs have no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Off: an output without a gradient gives None in the backward pass, no zeros."""
