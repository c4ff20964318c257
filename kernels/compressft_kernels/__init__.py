"""Kernels of compressft: knows torch and triton, nothing of transformers or compressft."""

from compressft_kernels.reference import adapter

__all__ = ["adapter"]
