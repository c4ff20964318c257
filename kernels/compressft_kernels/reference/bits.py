"""Masks of one bit a weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _places(like: Tensor) -> Tensor:
    """The values of a byte's bits; no shifts, which torch's ONNX export translates wrongly for uint8."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask to one bit an entry.

    Args:
        mask: (..., columns) bool.

    Returns:
        (..., ceil(columns / 8)) uint8. Column c of a row is bit c % 8 (least significant first) of its byte c // 8;
        the last byte's spare bits are 0.

    Raises:
        ValueError: a mask that is not bool, or has no dimension.
    """
    if mask.dtype != torch.bool or mask.dim() == 0:
        raise ValueError(f"pack_mask: mask {tuple(mask.shape)} is {mask.dtype}; want (..., columns) bool")
    padded = F.pad(mask, (0, -mask.shape[-1] % 8))
    # Not unflatten(-1, (-1, 8)): the -1 is ambiguous for an empty mask.
    eights = padded.reshape(*mask.shape[:-1], padded.shape[-1] // 8, 8).to(torch.uint8)
    return (eights * _places(mask)).sum(-1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, columns: int) -> Tensor:
    """The mask that `pack_mask` packed.

    Args:
        bits: (..., ceil(columns / 8)) uint8; spare bits are ignored.
        columns: entries in a row.

    Returns:
        (..., columns) bool.

    Raises:
        ValueError: bits of another dtype or width.
    """
    if bits.dtype != torch.uint8 or bits.dim() == 0 or columns < 0 or bits.shape[-1] != (columns + 7) // 8:
        raise ValueError(
            f"unpack_mask: bits {tuple(bits.shape)} are {bits.dtype}; "
            f"want (..., {(columns + 7) // 8}) uint8 for {columns} columns"
        )
    return (bits.unsqueeze(-1) & _places(bits)).ne(0).flatten(-2)[..., :columns]
