"""The Triton kernels on the CPU, under triton's interpreter: only where TRITON_INTERPRET=1, see ../test_interpreted.py.

The interpreter reads and writes out of bounds in silence, so every operand lies between NaNs and every fresh output
is full of them.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

# Against float64, relative to the largest value: a few roundings of the dtype; its sums are of float32 at least.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}
MARGIN = 64


@pytest.fixture
def random():
    """random(*shape, dtype=...) -> tensor; the same sequence in every test."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def poison():
    """poison(t) -> a copy of t with its strides, in a buffer whose every other element is NaN (255 for uint8)."""

    def surround(tensor):
        if tensor is None:
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        extent = extent if tensor.numel() else 0
        fill = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        buffer = torch.full((extent + 2 * MARGIN,), fill, dtype=tensor.dtype)
        copy = buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)
        if 0 not in tensor.stride():
            copy.copy_(tensor)
        else:
            # A broadcast dimension holds one element.
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
            copy[once].copy_(tensor[once])
        return copy

    return surround


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh memory is full of NaN (integers: of their largest value), so that what a kernel does not write shows."""

    def poisoned(function):
        def fresh(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return fresh

    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def close():
    """close(got, want, dtype): same shape, no NaN, and within the dtype's tolerance of the float64 `want`."""

    def check(got, want, dtype):
        assert got.shape == want.shape and got.dtype == dtype and want.dtype == torch.float64
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * scale, rtol=0.0)

    return check
