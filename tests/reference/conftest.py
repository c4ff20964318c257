"""Seeded operands for the twins' tests, and the error a dtype may have against float64."""

import pytest
import torch

# Relative to the largest value of the float64 result, which is computed from the same rounded operands.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def random():
    """random(*shape, dtype=...) -> tensor; the same sequence in every test."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float64):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def close():
    """close(got, want, dtype): same shape, no NaN, and within the dtype's tolerance of the float64 `want`."""

    def check(got, want, dtype=torch.float64):
        assert got.shape == want.shape and got.dtype == dtype and want.dtype == torch.float64
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * scale, rtol=0.0)

    return check


@pytest.fixture
def gradients():
    """gradients(function, *tensors) -> output, dy, and the gradient of every tensor, by dy drawn once."""
    generator = torch.Generator().manual_seed(1)

    def run(function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*leaves)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        return y.detach(), dy, torch.autograd.grad(y, leaves, dy)

    return run
