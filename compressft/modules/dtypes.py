"""What is added to a model computes in the model's precision, whatever its own tensors are kept in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def like(x: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """These tensors (or None) in the dtype of `x`, as a model that was cast to bf16 wants them; autocast sees to it."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(tensor if tensor is None or tensor.dtype == x.dtype else tensor.to(x.dtype) for tensor in tensors)
