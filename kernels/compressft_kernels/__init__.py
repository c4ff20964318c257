"""Kernels of compressft: knows torch and triton, nothing of transformers or compressft."""

from compressft_kernels.reference import (
    adapter,
    block_sparse_linear,
    masked_linear,
    pack_mask,
    packed_linear,
    prefix_attention,
    unpack_mask,
)

__all__ = [
    "adapter",
    "block_sparse_linear",
    "masked_linear",
    "pack_mask",
    "packed_linear",
    "prefix_attention",
    "unpack_mask",
]
