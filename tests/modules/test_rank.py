"""Exact numbers of the largest values, whatever is equal."""

import pytest
import torch

from compressft.modules.rank import keep_largest, keep_pattern, nth_largest


@pytest.mark.parametrize("number", [1, 2, 5, 11, 12])
def test_nth_largest_against_sorting(number):
    values = torch.tensor([3.0, -1, 7, 7, 0, 2, -5, 7, 1, 1, 4, 0])
    assert nth_largest(values, number) == values.sort(descending=True).values[number - 1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("number", [-1, 0, 1, 7, 29, 30, 31, 60])
def test_exact_over_several_tensors(number, ties):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((4, 5), (5, 2))]
    if ties:
        values = [v.sign() for v in values]
    masks = keep_largest(values, number)
    assert sum(int(m.sum()) for m in masks) == min(max(number, 0), 30)
    assert [m.shape for m in masks] == [v.shape for v in values] and all(m.dtype == torch.bool for m in masks)
    kept = torch.cat([v[m] for v, m in zip(values, masks, strict=True)])
    dropped = torch.cat([v[~m] for v, m in zip(values, masks, strict=True)])
    if len(kept) and len(dropped):
        assert kept.min() >= dropped.max()


def test_ties_are_broken_by_position():
    first, second = keep_largest([torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])], 4)
    assert first.tolist() == [True] * 3 and second.tolist() == [False, True, False]


def test_transposed_values_are_masked_in_their_own_places():
    """A mask must follow the values, not the memory they are laid out in."""
    values = torch.arange(12.0).view(3, 4).t()
    (mask,) = keep_largest([values], 5)
    assert torch.equal(mask, values >= 7)


@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 20)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 4)])
@pytest.mark.parametrize("ties", [False, True])
def test_pattern_keeps_the_largest_n_of_every_m(shape, n, m, ties):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    if ties:
        values = torch.ones(shape)
    mask = keep_pattern(values, n, m)
    groups, kept = values.unflatten(1, (-1, m)), mask.unflatten(1, (-1, m))
    assert (kept.sum(-1) == n).all()
    low = groups.masked_fill(~kept, torch.inf).amin(-1)
    assert (low >= groups.masked_fill(kept, -torch.inf).amax(-1)).all()
    if ties:
        assert kept[..., :n].all()
