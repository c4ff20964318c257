"""Work on an input is shared by the layers that read it, and by nothing else."""

import gc
import weakref

import pytest
import torch

from compressft.modules import int8
from compressft.modules.last_input import LastInput
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int8Quantizer


def quantised(seed: int, ranges: str) -> CompressedLinear:
    torch.manual_seed(seed)
    linear = CompressedLinear(24, 16)
    linear.quantizer = Int8Quantizer(ranges)
    return linear


@pytest.mark.parametrize("ranges", ["static", "dynamic", "learned"])
def test_three_projections_quantise_their_input_once_and_give_what_they_give_alone(ranges, monkeypatch):
    calls = []
    real = int8.quantise_input
    monkeypatch.setattr(int8, "quantise_input", lambda *a: calls.append(1) or real(*a))
    layers = [quantised(i, ranges) for i in range(3)]
    apart = [quantised(i, ranges) for i in range(3)]
    x = torch.randn(2, 5, 24, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    together = sum(layer(x).square().sum() for layer in layers)
    assert len(calls) == 1
    alone = sum(layer(other.clone()).square().sum() for layer in apart)
    assert len(calls) == 4
    together.backward()
    alone.backward()
    assert torch.equal(together, alone)
    assert torch.equal(x.grad, other.grad)
    for one, two in zip(layers, apart, strict=True):
        assert torch.equal(one.weight.grad, two.weight.grad)


def test_ranges_of_their_own_are_quantised_apart():
    layers = [quantised(i, "static") for i in range(2)]
    layers[0](torch.randn(4, 24))
    layers[1](10 * torch.randn(4, 24))
    x = torch.randn(4, 24)
    first, second = (layer.eval()(x) for layer in layers)
    assert torch.equal(second, layers[1](x.clone()))
    assert torch.equal(first, layers[0](x.clone()))


def test_a_changed_input_is_computed_again():
    memo, x = LastInput(), torch.ones(3)
    assert memo.value(x, "sum", lambda: float(x.sum())) == 3.0
    assert memo.value(x, "sum", lambda: 0.0) == 3.0
    x.mul_(2)
    assert memo.value(x, "sum", lambda: float(x.sum())) == 6.0
    assert memo.value(x.clone(), "sum", lambda: 1.0) == 1.0


def test_nothing_outlives_the_input():
    memo, x = LastInput(), torch.ones(3)
    kept = memo.value(x, "double", lambda: x * 2)
    watched = weakref.ref(kept)
    del kept
    x = None
    gc.collect()
    assert watched() is None
