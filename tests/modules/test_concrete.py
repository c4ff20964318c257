"""Hard-concrete gates: formulas against Monte Carlo, constants of the papers, gradients."""

import math

import pytest
import torch

from compressft.modules.concrete import deterministic, gated, open_probability, sample
from compressft.modules.l0 import L0Gate


# Movement-L0 and CoFi, Voita et al., diff pruning.
@pytest.mark.parametrize(("temperature", "low", "high"), [(2 / 3, -0.1, 1.1), (0.33, -0.1, 1.1), (1.0, -1.5, 1.5)])
@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 2.197])
def test_open_probability_is_how_often_a_sample_is_not_zero(temperature, low, high, log_alpha):
    torch.manual_seed(0)
    draws = sample(torch.full((200_000,), log_alpha), temperature, low, high)
    assert draws.min() >= 0 and draws.max() <= 1
    expected = float(open_probability(torch.tensor(log_alpha), temperature, low, high))
    assert float((draws > 0).float().mean()) == pytest.approx(expected, abs=0.005)


def test_known_values():
    # sigmoid(2.197) = .9 and P(open) = .978; Voita's 0 gives .688.
    assert float(torch.sigmoid(torch.tensor(2.197))) == pytest.approx(0.9, abs=1e-4)
    assert float(open_probability(torch.tensor(2.197))) == pytest.approx(0.978, abs=1e-3)
    assert float(open_probability(torch.tensor(0.0), 0.33)) == pytest.approx(0.688, abs=1e-3)
    edge = math.log(11.0)
    values = deterministic(torch.tensor([-edge - 1e-3, -edge + 1e-3, edge - 1e-3, edge + 1e-3, 0.0]))
    assert values[0] == 0.0 and values[1] > 0.0 and values[2] < 1.0 and values[3] == 1.0
    assert float(values[4]) == pytest.approx(0.5)


def test_deterministic_values_take_a_temperature_if_given():
    x = torch.tensor([-1.0, 0.5])
    want = (torch.sigmoid(x / 0.5) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(deterministic(x, temperature=0.5), want)


def test_samples_are_reproducible_and_differentiable():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    first = sample(x)
    torch.manual_seed(5)
    assert torch.equal(first, sample(x))
    first.sum().backward()
    inside = (first > 0) & (first < 1)
    assert (x.grad[inside] > 0).all() and (x.grad[~inside] == 0).all() and inside.any() and (~inside).any()


def by_the_paper(log_alpha, temperature, low, high):
    """Equations 10 and 11, with autograd's own slopes."""
    u = torch.empty_like(log_alpha).uniform_(1e-6, 1 - 1e-6)
    return (low + (high - low) * torch.sigmoid((u.logit() + log_alpha) / temperature)).clamp(0, 1)


@pytest.mark.parametrize(("temperature", "low", "high"), [(2 / 3, -0.1, 1.1), (1.0, -1.5, 1.5)])
def test_gated_is_values_times_gates_with_the_papers_slopes(temperature, low, high):
    """Where gates are clipped, too: a third of these are."""
    torch.manual_seed(1)
    log_alpha = torch.linspace(-4, 4, 600, dtype=torch.float64).reshape(20, 30).requires_grad_()
    values = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(20, 30, dtype=torch.float64)
    torch.manual_seed(2)
    z = by_the_paper(log_alpha, temperature, low, high)
    assert int((z == 0).sum()) > 100 and int((z == 1).sum()) > 50
    want = values * z
    slopes = torch.autograd.grad(want, (values, log_alpha), grad)
    torch.manual_seed(2)
    got = gated(values, log_alpha, temperature, low, high)
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (values, log_alpha), grad), slopes)


def test_gated_keeps_nothing_but_values_and_gates():
    values, log_alpha = torch.randn(20, 30, requires_grad=True), torch.zeros(20, 30, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated(values, log_alpha)
    assert len(kept) == 2 and any(tensor.data_ptr() == values.data_ptr() for tensor in kept)


def test_gate_is_random_in_training_and_deterministic_otherwise():
    gate = L0Gate(6, 5, 0.3)
    weight = torch.randn(6, 5)
    gate.train()
    assert not torch.equal(gate(weight), gate(weight))
    gate.eval()
    torch.testing.assert_close(gate(weight), weight * deterministic(torch.tensor(0.3)))
    gate.train()
    gate.settle()
    assert torch.equal(gate(weight), gate(weight)) and not gate.scores.requires_grad
    gate.settle(False)
    assert gate.scores.requires_grad and not torch.equal(gate(weight), gate(weight))


def test_gate_counts_what_is_open():
    gate = L0Gate(2, 3, 0.0)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([[-5.0, -2.5, -2.0], [0.0, 2.0, 5.0]]))
    assert gate.mask.tolist() == [[False, False, True], [True, True, True]]
    want = torch.sigmoid(gate.scores - 2 / 3 * math.log(0.1 / 1.1)).mean()
    torch.testing.assert_close(gate.open(), want)
    gate.open().backward()
    assert (gate.scores.grad > 0).all()
