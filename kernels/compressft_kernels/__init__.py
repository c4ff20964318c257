"""Kernels of compressft: knows torch and triton, nothing of transformers or compressft."""

from compressft_kernels.dispatch import explain
from compressft_kernels.nf4 import NF4
from compressft_kernels.ops.linear import masked_linear, packed_linear
from compressft_kernels.reference import (
    adapter,
    block_sparse_linear,
    pack_mask,
    prefix_attention,
    unpack_mask,
)

__all__ = [
    "NF4",
    "adapter",
    "block_sparse_linear",
    "explain",
    "masked_linear",
    "pack_mask",
    "packed_linear",
    "prefix_attention",
    "unpack_mask",
]
