"""Kernels of compressft: knows torch and triton, nothing of transformers or compressft."""

from compressft_kernels.dispatch import explain
from compressft_kernels.nf4 import NF4
from compressft_kernels.ops.block_sparse import block_sparse_linear
from compressft_kernels.ops.bottleneck import adapter
from compressft_kernels.ops.linear import masked_linear, packed_linear
from compressft_kernels.ops.prefix import prefix_attention
from compressft_kernels.reference import pack_mask, unpack_mask

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
