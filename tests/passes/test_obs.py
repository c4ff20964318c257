"""Optimal Brain Surgeon: every removal is the cheapest one, the compensation is the least-squares optimum."""

from itertools import pairwise

import pytest
import torch

from compressft.passes.shared.obs import BLOCK, refit, removal

CASES = [(5, 24, 8), (3, 30, 5), (6, 40, 1), (4, 2 * BLOCK + 9, 1)]


def problem(out, width, seed=0, rows=400):
    """A weight and correlated inputs of very different sizes: (weight, inputs, second moments)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) @ (mix + torch.eye(width))
    x *= torch.linspace(0.2, 2.0, width)
    weight = torch.randn(out, width, generator=generator, dtype=torch.float64)
    return weight, x, x.t() @ x / rows


def columns_of(groups, size):
    return (torch.tensor(sorted(groups))[:, None] * size + torch.arange(size)).flatten()


def loss(weight, new, moment):
    difference = weight - new
    return float((difference @ moment * difference).sum())


def best_loss(weight, moment, kept):
    """Loss of the best weights that only the kept columns have."""
    new = torch.zeros_like(weight)
    if len(kept):
        new[:, kept] = refit(weight, moment, kept)
    return loss(weight, new, moment)


@pytest.mark.parametrize(("out", "width", "size"), CASES)
def test_the_refit_is_the_least_squares_solution_on_the_data(out, width, size):
    weight, x, moment = problem(out, width)
    order, _ = removal(weight, moment, size)
    for number in range(1, len(order)):
        kept = columns_of(order[number:], size)
        want = torch.linalg.lstsq(x[:, kept], x @ weight.t()).solution.t()
        torch.testing.assert_close(refit(weight, moment, kept), want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("out", "width", "size"), CASES)
def test_the_error_curve_is_that_of_the_refitted_weights(out, width, size):
    weight, _, moment = problem(out, width)
    order, errors = removal(weight, moment, size)
    whole = loss(weight, torch.zeros_like(weight), moment)
    assert sorted(order) == list(range(width // size)) and len(errors) == len(order) + 1
    for number, error in enumerate(errors):
        kept = columns_of(order[number:], size) if number < len(order) else torch.tensor([], dtype=torch.int64)
        assert error == pytest.approx(best_loss(weight, moment, kept) / whole, abs=1e-10)
    assert errors[0] == 0.0 and errors[-1] == pytest.approx(1.0)
    assert all(a <= b for a, b in pairwise(errors))


@pytest.mark.parametrize(("out", "width", "size"), CASES[:3])
def test_each_removal_is_the_cheapest_one(out, width, size):
    weight, _, moment = problem(out, width, seed=3)
    order, _ = removal(weight, moment, size)
    for number in range(len(order) - 1):
        left = order[number:]
        after = {g: best_loss(weight, moment, columns_of([h for h in left if h != g], size)) for g in left}
        assert min(after, key=lambda g: after[g]) == order[number]


def test_single_columns_agree_with_the_plain_algorithm():
    from compressft.passes.shared.obs import _columns, _groups

    weight, _, moment = problem(4, BLOCK + 30, seed=5)
    inverse = torch.linalg.inv(moment)
    (fast, added), (plain, expected) = _columns(weight, inverse), _groups(weight, inverse, 1)
    assert fast == plain
    torch.testing.assert_close(torch.tensor(added), torch.tensor(expected), atol=1e-9, rtol=1e-7)


def test_what_others_can_replace_goes_first():
    weight, x, _ = problem(6, 20)
    x[:, 7] = x[:, 3] + 1e-3 * x[:, 7]
    moment = x.t() @ x / len(x) + 1e-6 * torch.eye(20)
    order, errors = removal(weight, moment, 1)
    assert order[0] in (3, 7) and errors[1] < 1e-4
    kept = columns_of(order[1:], 1)
    new = torch.zeros_like(weight)
    new[:, kept] = refit(weight, moment, kept)
    gone, twin = (3, 7) if order[0] == 3 else (7, 3)
    torch.testing.assert_close(new[:, twin], weight[:, gone] + weight[:, twin], atol=2e-2, rtol=2e-2)


def test_inputs_without_signal_go_first_and_cost_nothing():
    weight, x, _ = problem(3, 12)
    x[:, [2, 9]] = 0
    moment = x.t() @ x / len(x) + 1e-8 * torch.eye(12)
    order, errors = removal(weight, moment, 1)
    assert set(order[:2]) == {2, 9} and errors[2] < 1e-6


def test_a_weight_of_zeros_counts_as_lost():
    order, errors = removal(torch.zeros(3, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), 2)
    assert sorted(order) == [0, 1, 2, 3] and len(errors) == 5 and all(e == e for e in errors)
