"""MaskGate: one bit a weight, the same product on every path, and no gradient for what is pruned."""

import pytest
import torch
from torch.nn import functional as F

from compressft.modules.gate import MaskGate
from compressft.modules.linear import CompressedLinear


def example(rows=5, columns=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, torch.rand(rows, columns, generator=generator) > 0.4


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 11), (3, 8), (7, 17)])
def test_bits_hold_the_mask(rows, columns):
    gate = MaskGate(rows, columns)
    assert gate.mask.all() and gate.mask.shape == (rows, columns)
    weight, mask = example(rows, columns)
    assert torch.equal(gate(weight), weight)
    gate.keep(mask)
    assert torch.equal(gate.mask, mask) and torch.equal(gate(weight), weight * mask)
    assert gate.bits.shape == (rows, -(-columns // 8)) and gate.bits.dtype == torch.uint8


def test_the_product_is_that_of_the_masked_weight_and_so_are_the_gradients():
    weight, mask = example()
    gate = MaskGate(*weight.shape)
    gate.keep(mask)
    x, bias = torch.randn(2, 3, 11), torch.randn(5)
    results = []
    for product in (lambda w: gate.linear(x, w, bias), lambda w: F.linear(x, gate(w), bias)):
        w = weight.clone().requires_grad_()
        y = product(w)
        y.square().sum().backward()
        assert (w.grad[~mask] == 0).all() and (w.grad[mask] != 0).all()
        results.append((y, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_mask_is_seen_at_once():
    """On the CPU the masked weight is kept between calls."""
    weight, mask = example()
    gate, x = MaskGate(*weight.shape), torch.randn(4, 11)
    for now in (mask, ~mask, mask):
        gate.keep(now)
        torch.testing.assert_close(gate.linear(x, weight, None), x @ (weight * now).t())
    other = MaskGate(*weight.shape)
    other.load_state_dict(gate.state_dict())
    gate.keep(torch.ones_like(mask))
    torch.testing.assert_close(other.linear(x, weight, None), x @ (weight * mask).t())


def test_pruned_weights_stay_zero_through_momentum_and_decay():
    _, mask = example()
    linear = CompressedLinear.of(torch.nn.Linear(11, 5))
    linear.gates["one"] = MaskGate(5, 11)
    optimiser = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.3)
    for step in range(6):
        linear(torch.randn(4, 11)).square().sum().backward()
        if step == 2:
            linear.gates["one"].keep(mask)
        optimiser.step()
        optimiser.zero_grad()
        if step >= 2:
            assert (linear.effective_weight()[~mask] == 0).all()
    linear.fold("one")
    assert (linear.weight[~mask] == 0).all() and (linear.weight[mask] != 0).all()
