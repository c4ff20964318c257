"""What is added to a model computes in the model's precision, whatever its own tensors are kept in."""

from __future__ import annotations

from typing import TypeVarTuple

import torch
from torch import Tensor

Tensors = TypeVarTuple("Tensors")


def like(x: Tensor, *tensors: *Tensors) -> tuple[*Tensors]:
    """These tensors (or None) in the dtype of `x`, as a model that was cast to bf16 wants them; autocast sees to it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return tensors
    cast = (t.to(x.dtype) if isinstance(t, Tensor) and t.dtype != x.dtype else t for t in tensors)
    # One for each that was given, which no type says of a generator.
    return tuple(cast)  # type: ignore[return-value]
