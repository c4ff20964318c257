"""The Triton kernels on the CPU, under triton's interpreter: only where TRITON_INTERPRET=1, see ../test_interpreted.py.

The interpreter reads and writes out of bounds in silence, so every operand lies between NaNs and every fresh output
is full of them.
"""

import os
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

# Against float64, relative to the largest value: a few roundings of the dtype; its sums are of float32 at least.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3}
MARGIN = 64


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter without what takes over half of its time and gives nothing here.

    It looks through the whole language for what to replace at every call of a device function (once a launch is
    enough), makes a table of dtypes for each it looks up, and computes all integer sums twice to find overflows, of
    which it then says nothing.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.language.core import is_builtin, pointer_type
    from triton.runtime import interpreter

    patch, look_up, first = interpreter._patch_builtin, interpreter._get_np_dtype, {}
    remembered = lru_cache(look_up)

    def patch_once(package, *rest):
        if package in first and not is_builtin(getattr(package, first[package])):
            return  # they are put back all together
        names = [name for name in dir(package) if is_builtin(getattr(package, name))]
        if names:
            first[package] = names[0]
        patch(package, *rest)

    def numpy_dtype(dtype):
        element = dtype.scalar
        return (look_up if isinstance(element, pointer_type) else remembered)(element)

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_builtin", patch_once)
        change.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        change.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        yield


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
