"""ScoreGate: exact numbers under ties, straight-through gradients by the formula, tiles that do not fit."""

import pytest
import torch
from torch.nn import functional as F

from compressft.modules.gate import ScoreGate, keep_top, pool, spread
from compressft.modules.linear import CompressedLinear

SHAPES = [((5, 11), (1, 1)), ((5, 11), (2, 3)), ((8, 6), (4, 3)), ((3, 4), (8, 8)), ((7, 5), (7, 1)), ((1, 1), (2, 2))]


def scored(shape, tile, seed=0, **more):
    gate = ScoreGate(*shape, tile, **more)
    with torch.no_grad():
        gate.scores.copy_(torch.randn(gate.scores.shape, generator=torch.Generator().manual_seed(seed)))
    return gate


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_everything_lives_at_first(shape, tile):
    gate, weight = ScoreGate(*shape, tile), torch.randn(shape)
    assert gate.mask.all() and torch.equal(gate(weight), weight)
    assert gate.scores.shape == (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
def test_spread_and_pool_against_loops(shape, tile):
    gate, weight = scored(shape, tile), torch.randn(shape)
    spreaded, pooled = torch.empty(shape), torch.zeros_like(gate.scores.data)
    for i in range(shape[0]):
        for j in range(shape[1]):
            spreaded[i, j] = gate.scores[i // tile[0], j // tile[1]]
            pooled[i // tile[0], j // tile[1]] += weight[i, j]
    assert torch.equal(spread(gate.scores.data, tile, weight.shape), spreaded)
    torch.testing.assert_close(pool(weight, tile), pooled)


@pytest.mark.parametrize(("shape", "tile"), SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_movement_pruning(shape, tile, frozen):
    """dL/dS = dL/dW' * W summed over the tile, also where the tile is dead; dL/dW = dL/dW' where it lives."""
    gate = scored(shape, tile)
    gate.keep_top(max(gate.scores.numel() // 2, 1))
    weight, x, bias = torch.randn(shape), torch.randn(4, shape[1]), torch.randn(shape[0])
    target = torch.randn(4, shape[0])
    mask = spread(gate.mask, tile, weight.shape)
    effective = (weight * mask).requires_grad_()
    F.linear(x, effective, bias).sub(target).square().sum().backward()
    for product in (lambda w: gate.linear(x, w, bias), lambda w: F.linear(x, gate(w), bias)):
        w = weight.clone().requires_grad_(not frozen)
        gate.scores.grad = None
        product(w).sub(target).square().sum().backward()
        torch.testing.assert_close(gate.scores.grad, pool(effective.grad * weight, tile))
        if not frozen:
            torch.testing.assert_close(w.grad, effective.grad * mask)


@pytest.mark.parametrize("grows", [True, False])
def test_a_weight_that_moves_away_from_zero_gains_score(grows):
    """One weight: minimising (w - target)^2 makes |w| grow or shrink, and the score goes along."""
    linear = CompressedLinear.of(torch.nn.Linear(1, 1, bias=False))
    linear.gates["movement"] = ScoreGate(1, 1)
    for sign in (1.0, -1.0):
        with torch.no_grad():
            linear.weight.fill_(0.5 * sign)
        scores = linear.gates["movement"].scores
        with torch.no_grad():
            scores.zero_()
        optimiser = torch.optim.SGD(linear.parameters(), lr=0.05)
        before = abs(linear.weight.item())
        for _ in range(5):
            optimiser.zero_grad()
            (linear(torch.ones(1, 1)) - sign * (2.0 if grows else 0.1)).square().sum().backward()
            optimiser.step()
        assert (abs(linear.weight.item()) > before) == grows
        assert (scores.item() > 0) == grows


@pytest.mark.parametrize("values", ["zeros", "few", "random", "subnormal", "tiny", "negative"])
@pytest.mark.parametrize("number", [0, 1, 7, 20, 53, 54, 55, 56])
def test_exact_numbers_whatever_is_equal(values, number):
    gate = ScoreGate(5, 11)
    least = torch.finfo(torch.float32).tiny
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5, 11, generator=generator)
    with torch.no_grad():
        gate.scores.copy_(
            {
                "zeros": torch.zeros(5, 11),
                "few": noise.round(),
                "random": noise,
                "subnormal": noise * 1e-39,
                "tiny": noise.sign() * least,
                "negative": -noise.abs().round(),
            }[values]
        )
    before = gate.scores.detach().clone()
    gate.keep_top(number)
    assert int(gate.mask.sum()) == min(number, 55)
    # Also where subnormal numbers count as 0.
    torch.set_flush_denormal(True)
    try:
        assert int(gate.mask.sum()) == min(number, 55)
    finally:
        torch.set_flush_denormal(False)
    if values in ("random", "few", "negative") and 0 < number < 55:
        assert before[gate.mask].min() >= before[~gate.mask].max()
        torch.testing.assert_close(gate.scores.detach(), before)
    state = {name: value.clone() for name, value in gate.state_dict().items()}
    gate.keep_top(number)
    assert all(torch.equal(value, state[name]) for name, value in gate.state_dict().items()), "idempotent"


def test_ties_are_broken_by_position():
    gate = ScoreGate(2, 3)
    gate.keep_top(4)
    assert gate.mask.tolist() == [[True] * 3, [True, False, False]]
    gate.keep_top(2)
    assert gate.mask.tolist() == [[True, True, False], [False] * 3]


def test_the_kept_product_follows_ties_that_are_moved():
    """On the CPU the masked weight is kept between calls: it must see scores that change below an equal threshold."""
    gate, weight, x = ScoreGate(2, 3), torch.randn(2, 3), torch.randn(4, 3)
    for number in (5, 3, 1, 6):
        gate.keep_top(number)
        torch.testing.assert_close(gate.linear(x, weight, None), x @ (weight * gate.mask).t())
        assert int(gate.mask.sum()) == number


@pytest.mark.parametrize("number", [0, 1, 9, 17, 30, 31, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_gates_compete_for_one_number(number, ties):
    gates = [scored((4, 5), (1, 1), 1), scored((9, 9), (3, 4), 2), scored((2, 1), (1, 1), 3)]
    if ties:
        with torch.no_grad():
            for gate in gates:
                gate.scores.copy_(gate.scores.sign())
    keep_top(gates, number)
    assert sum(int(g.mask.sum()) for g in gates) == min(number, 31)
    live = torch.cat([g.scores[g.mask] for g in gates])
    dead = torch.cat([g.scores[~g.mask] for g in gates])
    assert not len(live) or not len(dead) or live.min() > dead.max()
    assert len({float(g.threshold) for g in gates}) == 1


def test_columns_say_what_will_be_removed():
    assert ScoreGate(4, 6, (2, 2)).columns() is None
    gate = ScoreGate(4, 6, (2, 2), unit=3)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([[0.0, 0, 1], [0, 0, 0]]))
    gate.keep_top(1)
    # Columns 4 and 5 live; they belong to the second unit of three, which stays whole.
    assert gate.columns().tolist() == [0, 0, 0, 1, 1, 1]
    neurons = ScoreGate(4, 3, (4, 1), unit=1)
    with torch.no_grad():
        neurons.scores.copy_(torch.tensor([[1.0, 3, 2]]))
    neurons.keep_top(2)
    assert neurons.columns().tolist() == [0, 1, 1]
    neurons.keep_top(0)
    assert neurons.columns().tolist() == [1, 0, 0], "one is always left"


def test_checkpoints_carry_scores_and_threshold():
    gate, other = scored((5, 11), (1, 1)), ScoreGate(5, 11)
    gate.keep_top(17)
    assert set(gate.state_dict()) == {"scores", "threshold"}
    other.load_state_dict(gate.state_dict())
    assert torch.equal(gate.mask, other.mask)
