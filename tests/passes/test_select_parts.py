"""Selection: pure functions of scores and budgets. Heads and neurons are tested with the pass."""

import itertools

import pytest
import torch

from compressft.passes.shared.select_parts import (
    Alive,
    aligned,
    encoder_sparsity,
    keep_expected,
    keep_hidden,
    keep_layers,
)


@pytest.mark.parametrize("depth", [1, 2, 7, 12])
def test_layers(depth):
    scores = torch.rand(depth, generator=torch.Generator().manual_seed(0))
    counts = []
    for percent in range(101):
        kept = keep_layers(scores, percent / 100)
        counts.append(len(kept))
        assert abs(len(kept) - percent / 100 * depth) <= 0.5 + 1e-9 or len(kept) == 1
        assert set(kept.tolist()) == set(scores.topk(len(kept)).indices.tolist())
        assert torch.equal(kept, kept.unique())
    assert counts[0] == 1 and counts[-1] == depth and counts == sorted(counts)


@pytest.mark.parametrize(("width", "align"), [(384, 32), (384, 64), (312, 64), (20, 32)])
def test_hidden_stays_aligned(width, align):
    scores = torch.rand(width, generator=torch.Generator().manual_seed(0))
    for percent in range(0, 101, 5):
        number = len(keep_hidden(scores, percent / 100, align))
        assert number == width or (number % align == 0 and number >= align)
        # The whole width may be nearer than the last multiple below it.
        assert abs(number - percent / 100 * width) <= align / 2 or number == min(align, width)
    assert len(keep_hidden(scores, 1.0, align)) == width


def test_expected_numbers_are_the_sums_of_probabilities():
    probabilities = [torch.tensor([0.9, 0.2, 0.8, 0.7]), torch.tensor([0.1, 0.1, 0.2, 0.15])]
    first, second = keep_expected(probabilities, 1, 1, False)
    assert first.tolist() == [0, 2, 3] and second.tolist() == [2], "2.6 and 0.55, of which one stays"
    assert [len(g) for g in keep_expected(probabilities, 1, 1, True)] == [2, 2]
    assert [len(g) for g in keep_expected(probabilities, 2, 2, False)] == [2, 2]


@pytest.mark.parametrize("size", [1, 7, 64, 100])
@pytest.mark.parametrize("align", [1, 8, 32])
@pytest.mark.parametrize("floor", [1, 8, 40])
def test_aligned_is_the_nearest_allowed(size, align, floor):
    low = min(-(-floor // align) * align, size)
    allowed = [n for n in {*range(0, size + 1, align), size} if n >= low]
    for tenth in range(0, 10 * size + 1, 3):
        number = aligned(tenth / 10, align, floor, size)
        assert number in allowed
        assert abs(number - tenth / 10) <= min(abs(n - tenth / 10) for n in allowed) + 1e-9


def brute_force(heads, ffn, layers, hidden, head_cost, ffn_cost):
    """Weight by weight."""
    total = live = 0
    for index, alive in enumerate(layers):
        for parts, cost in ((heads[index], head_cost[index]), (ffn[index], ffn_cost[index])):
            for part, dim in itertools.product(parts.tolist(), hidden.tolist()):
                total += cost
                live += cost * bool(part and dim and alive)
    return 1 - live / total


def draw(probabilities, generator):
    return (torch.rand(probabilities.shape, generator=generator) < probabilities).float()


def test_expected_sparsity_is_the_mean_of_drawn_ones():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.rand(3, generator=generator), torch.rand(2, generator=generator)]
    ffn = [torch.rand(5, generator=generator), torch.rand(4, generator=generator)]
    layers, hidden = torch.rand(2, generator=generator), torch.rand(6, generator=generator)
    costs = ([40, 32], [3, 2])
    expected = float(encoder_sparsity(Alive(heads, ffn, layers, hidden), *costs))
    drawn = []
    for index in range(4000):
        masks = [[draw(p, generator) for p in group] for group in (heads, ffn)]
        masks += [draw(layers, generator), draw(hidden, generator)]
        one = float(encoder_sparsity(Alive(*masks), *costs))
        if index < 20:
            assert one == pytest.approx(brute_force(*masks, *costs), abs=1e-6)
        drawn.append(one)
    error = torch.tensor(drawn).std() / len(drawn) ** 0.5
    assert abs(sum(drawn) / len(drawn) - expected) < 4 * error
    assert error < 0.01
