"""Pruned tensors in files: one bit a weight and the values that are left. Storage alone: nothing gets faster."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressft_kernels import pack_mask, unpack_mask
from torch import Tensor

BITS, VALUES = "#bits", "#values"


def packed_bytes(tensor: Tensor) -> int:
    """Bytes of a floating tensor of two dimensions as bits and values."""
    rows, columns = tensor.shape
    return rows * -(-columns // 8) + int(torch.count_nonzero(tensor)) * tensor.element_size()


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace each matrix that gets smaller by `name#bits` (out, ceil(in / 8)) uint8 and `name#values` (nonzeros,)."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        matrix = tensor.dim() == 2 and tensor.is_floating_point()
        if matrix and packed_bytes(tensor) < tensor.numel() * tensor.element_size():
            mask = tensor != 0
            packed[name + BITS] = pack_mask(mask)
            packed[name + VALUES] = tensor[mask]
            # The columns cannot be told from the bits.
            packed[name + "#shape"] = torch.tensor(tensor.shape)
        else:
            packed[name] = tensor
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `pack`, to the bit (a negative zero comes back as zero)."""
    found = {name: tensor for name, tensor in tensors.items() if "#" not in name}
    for key, bits in tensors.items():
        if key.endswith(BITS):
            name = key.removesuffix(BITS)
            rows, columns = tensors[name + "#shape"].tolist()
            values = tensors[name + VALUES]
            dense = torch.zeros(rows, columns, dtype=values.dtype)
            dense[unpack_mask(bits, columns)] = values
            found[name] = dense
    return found
