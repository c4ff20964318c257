"""Which precision training computes in on a device."""

from __future__ import annotations

import torch

from compressft.errors import UserError


def computes_in_bf16(device: str) -> bool:
    """Whether the hardware itself multiplies bf16 (emulation is slower than fp32)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def autocast_dtype(precision: str, device: str) -> torch.dtype | None:
    """The autocast dtype of a recipe's `precision`, None for fp32.

    Raises:
        UserError: fp16 is asked for without a GPU.
    """
    if precision == "fp16" and device != "cuda":
        raise UserError("train.precision: 'fp16' needs a CUDA device; use bf16, fp32 or auto")
    if precision == "auto":
        # GPUs before compute capability 8.0 multiply fp16 only.
        return torch.bfloat16 if computes_in_bf16(device) else (torch.float16 if device == "cuda" else None)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
