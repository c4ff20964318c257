"""Error-compensated rounding: below rounding to nearest on correlated inputs, equal to it on uncorrelated ones."""

import pytest
import torch

from compressft.modules import gptq as module
from compressft.modules.gptq import gptq
from compressft.modules.int4 import dequantise, fake_quantise, grid_of, quantise


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns, rows=2000):
    """Inputs that lie near a subspace, as activations do, with a few loud columns."""
    x = draw(rows, columns // 4, seed=1) @ draw(columns // 4, columns, seed=2) + 0.3 * draw(rows, columns, seed=3)
    x[:, ::17] *= 8.0
    return x


def moments_of(x):
    return x.t() @ x / len(x)


@pytest.mark.parametrize("columns", [64, 200, 333])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 128])
def test_layer_error_is_below_nearest(columns, symmetric, block):
    weight, x = draw(40, columns), correlated(columns)
    rounded, grid = gptq(weight, moments_of(x), block, symmetric)
    nearest = fake_quantise(weight, block, symmetric)
    fresh = correlated(columns)[:500] + 0.05 * draw(500, columns, seed=9)
    error, reference = ((fresh @ (w - weight).t()).norm() for w in (rounded, nearest))
    assert error < 0.7 * reference
    # The entries themselves lie farther away: what is gained is the output's.
    assert (rounded - weight).norm() > (nearest - weight).norm()
    assert all(torch.equal(a, b) for a, b in zip(grid, grid_of(weight, block, symmetric), strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_result_lies_on_the_grid(symmetric):
    weight = draw(40, 200)
    rounded, grid = gptq(weight, moments_of(correlated(200)), 32, symmetric)
    again = dequantise(quantise(rounded, 32, grid), grid, 200)
    assert torch.equal(again, rounded)


def test_uncorrelated_inputs_give_nearest():
    weight = draw(40, 100)
    energy = torch.linspace(0.1, 5.0, 100)
    energy[3] = 0.0
    rounded, _ = gptq(weight, torch.diag(energy), 32, True)
    assert torch.equal(rounded, fake_quantise(weight, 32, True))


def test_errors_are_passed_on_however_columns_are_batched(monkeypatch):
    weight, moments = draw(40, 200), moments_of(correlated(200))
    found = []
    for together in (7, 128, 1000):
        monkeypatch.setattr(module, "TOGETHER", together)
        found.append(gptq(weight, moments, 32, True)[0])
    # The order of float sums may tip a value that lies half-way.
    assert all((other != found[0]).float().mean() < 0.01 for other in found[1:])


def test_columns_without_signal_do_no_harm():
    weight, x = draw(40, 100), correlated(100)
    x[:, 10:30] = 0.0
    rounded, _ = gptq(weight, moments_of(x), 32, True)
    assert torch.equal(rounded[:, 10:30], fake_quantise(weight, 32, True)[:, 10:30]) and rounded.isfinite().all()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"moments \(9, 9\) do not fit a weight of \(4, 8\)"):
        gptq(draw(4, 8), torch.eye(9), 32, True)
