"""ColumnGate: groups of columns, importance as an average of gradients, and no say in optimising."""

import pytest
import torch

from compressft.modules.gate import ColumnGate


def test_columns_repeat_a_group():
    gate = ColumnGate(3, 2)
    assert gate.columns().tolist() == [1.0] * 6
    gate.keep(torch.tensor([2]))
    assert gate.mask.tolist() == [0.0, 0.0, 1.0]
    assert gate.columns().tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    gate.keep(torch.tensor([0, 1]))
    assert gate.mask.tolist() == [1.0, 1.0, 0.0]


def test_importance_is_an_average_of_magnitudes():
    gate = ColumnGate(2, 1)
    gate.measure(True)
    for factor in (3.0, -5.0):
        (gate.columns() * torch.tensor([factor, 2.0])).sum().backward()
        gate.accumulate(0.75)
    assert gate.importance.tolist() == pytest.approx([0.75 * 0.75 + 0.25 * 5.0, (0.75 + 1) * 0.25 * 2.0])
    before = gate.importance.clone()
    gate.accumulate(0.75)
    assert torch.equal(gate.importance, before), "no gradient, no movement"


def test_micro_batches_add_up_before_the_magnitude():
    gate = ColumnGate(1, 1)
    gate.measure(True)
    for factor in (3.0, -2.0):
        (gate.columns() * factor).sum().backward()
    gate.accumulate(0.0)
    assert gate.importance.item() == 1.0


def test_measuring_can_be_switched_off():
    gate = ColumnGate(2, 1)
    gate.measure(True)
    gate.columns().sum().backward()
    gate.measure(False)
    assert gate.mask.grad is None and not gate.columns().requires_grad


def test_no_optimiser_sees_it_but_checkpoints_do():
    gate = ColumnGate(2, 3)
    gate.measure(True)
    assert list(gate.parameters()) == []
    assert set(gate.state_dict()) == {"mask", "importance"}
    other = ColumnGate(2, 3)
    other.measure(True)
    gate.keep(torch.tensor([1]))
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.mask, gate.mask) and other.mask.requires_grad
