"""What the kernels share: dtypes and dot precision as constexprs, activations and their derivatives."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compressft_kernels.dispatch import tf32_allowed

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def dtypes(dtype: torch.dtype) -> dict[str, tl.dtype | str]:
    """COMPUTE, the dtype of tl.dot's operands; ACC, the dtype it adds up in; PRECISION, how float32 is multiplied."""
    tf32 = dtype == torch.float32 and tf32_allowed()
    return {
        "COMPUTE": _DTYPES[dtype],
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The torch dtype of partial sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size` and is no smaller than `least` (tl.dot takes no less than 16)."""
    return max(least, 1 << (size - 1).bit_length())


@triton.jit
def _tanh(x):
    # Of -2|x|, whose exponential cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z); z in the accumulator's dtype."""
    if ACTIVATION == "relu":
        h = tl.maximum(z, 0.0)
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == "silu":
        h = z / (1.0 + tl.exp(-z))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        h = _tanh(z)
    return h


@triton.jit
def derivative(z, ACTIVATION: tl.constexpr):
    """act'(z); 0 at 0 for relu, as in torch."""
    if ACTIVATION == "relu":
        d = tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        d = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        d = s * (1.0 + z * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        t = _tanh(z)
        d = 1.0 - t * t
    return d
