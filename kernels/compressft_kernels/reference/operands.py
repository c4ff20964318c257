"""What the linear twins share about their operands: messages, autocast, and rows out of leading dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressft_kernels.nf4 import NF4


def describe(**tensors: Tensor | NF4 | None) -> str:
    """'x (2, 3), weight (4, 3)' for an error message; what is None is left out."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor is not None)


def rows(tensor: Tensor) -> Tensor:
    """(..., d) as (rows, d); unlike reshape(-1, d) also where d is 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give a linear layer's operands; None where it is off or leaves x alone (float64)."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def to_compute(name: str, x: Tensor, bias: Tensor | None, **weights: Tensor | NF4) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype to compute in: x's own, or autocast's.

    Raises:
        ValueError: without autocast, dtypes that differ or are not floating.
    """
    dense = {key: weight for key, weight in weights.items() if isinstance(weight, Tensor)}
    tensors = {"x": x, **dense} | ({} if bias is None else {"bias": bias})
    target = autocast_dtype(x)
    if not x.is_floating_point() or (target is None and any(t.dtype != x.dtype for t in tensors.values())):
        dtypes = ", ".join(f"{key} {tensor.dtype}" for key, tensor in tensors.items())
        raise ValueError(f"{name}: {dtypes}; want one floating dtype for all")
    dtype = target or x.dtype
    return x.to(dtype), None if bias is None else bias.to(dtype)
