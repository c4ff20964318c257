"""Pure-torch twins of the kernels, in any float dtype: the truth for tests, the CPU path and the ONNX path."""

from compressft_kernels.reference.bits import pack_mask, unpack_mask
from compressft_kernels.reference.block_sparse import block_sparse_linear
from compressft_kernels.reference.bottleneck import ACTIVATIONS, adapter
from compressft_kernels.reference.masked import masked_linear
from compressft_kernels.reference.packed import packed_linear
from compressft_kernels.reference.prefix import prefix_attention

__all__ = [
    "ACTIVATIONS",
    "adapter",
    "block_sparse_linear",
    "masked_linear",
    "pack_mask",
    "packed_linear",
    "prefix_attention",
    "unpack_mask",
]
