"""Dropout by bytes: torch's own but for which bits are drawn, at the asked probability to the last digit."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.dropout import Dropout, drop, quicken
from tests.tiny import tiny


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_drops_the_asked_share_of_every_element(p):
    calls, size = 2000, 200
    dropped = torch.stack([drop(torch.ones(size), p) == 0 for _ in range(calls)]).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation / (calls * size) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 5 * deviation / calls**0.5
    # Neighbours, and one call and the next, have nothing to do with each other.
    apart = dropped - p
    for product in (apart[:, 1:] * apart[:, :-1], apart[1:] * apart[:-1]):
        assert abs(product.mean()) < 4 * deviation**2 / product.numel() ** 0.5


def test_levels_between_two_integers_are_reached_by_drawing_among_both():
    """0.1 of 256 levels are 25.6: some calls drop 25 of them, some 26."""
    shares = torch.stack([(drop(torch.ones(100_000), 0.1) == 0).double().mean() for _ in range(40)])
    nearest = (shares[:, None] - torch.tensor([25 / 256, 26 / 256]).double()).abs()
    assert nearest.min(1).values.max() < 0.0045 and set(nearest.argmin(1).tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5), (1,), (), (0, 4), (2, 3, 129)])
def test_kept_values_are_scaled_and_gradients_are_those_of_what_was_kept(shape, dtype):
    x = (torch.rand(shape, dtype=torch.float64) + 0.5).to(dtype).requires_grad_()
    y = drop(x, 0.5)
    kept = y != 0
    assert y.dtype == dtype and y.shape == x.shape
    assert torch.equal(y, torch.where(kept, x * 2, 0))
    grad = torch.randn(shape).to(dtype)
    y.backward(grad)
    assert torch.equal(x.grad, torch.where(kept, grad * 2, 0))


def test_values_that_are_no_numbers_are_dropped_too():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(200)
    y = drop(x, 0.5)
    assert 200 < int((y == 0).sum()) < 400 and torch.isinf(y).any() and torch.isnan(y).any()


def test_transposed_inputs():
    x = torch.rand(7, 9).t() + 0.5
    y = drop(x, 0.5)
    assert torch.equal(y, torch.where(y != 0, x * 2, 0)) and (y == 0).any()


def test_nothing_happens_outside_training_or_at_zero():
    x = torch.rand(5)
    assert drop(x, 0.5, training=False) is x and drop(x, 0.0) is x
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("p", [0.001, 0.999, 1.0])
def test_probabilities_that_bytes_are_too_coarse_for_are_torchs(p):
    x = torch.rand(1000)
    torch.manual_seed(3)
    want = F.dropout(x, p)
    torch.manual_seed(3)
    assert torch.equal(drop(x, p), want)


def test_the_same_seed_draws_the_same_and_so_does_a_forward_computed_again():
    x = torch.rand(64, requires_grad=True)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append((drop(x, 0.3), drop(x, 0.3)))
    assert torch.equal(draws[0][0], draws[1][0]) and not torch.equal(draws[0][0], draws[0][1])
    y = checkpoint(lambda v: drop(v * 2, 0.3), x, use_reentrant=False, preserve_rng_state=True)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_a_byte_an_element_is_kept_for_the_backward_pass():
    kept = []
    x = torch.rand(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        drop(x, 0.1)
    assert kept == [1000]


def test_gradients_of_gradients():
    x, w = torch.rand(50, requires_grad=True), torch.rand(50, requires_grad=True)
    y = drop(x, 0.5)
    (first,) = torch.autograd.grad((y * w).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    assert torch.equal(second, torch.where(y != 0, 2.0, 0.0))


def test_models_keep_their_names_and_lose_their_slow_dropout(tmp_path):
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1, inplace=True), Own(0.1), nn.Linear(2, 2))
    quicken(model)
    assert [type(m) for m in model] == [Dropout, nn.Dropout, Own, nn.Linear] and model[0].p == 0.1
    saved = tiny("bert")
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "AutoModelForSequenceClassification")
    save_compressed(loaded, None, tmp_path / "model", {})
    for one in (loaded, load_compressed(tmp_path / "model")):
        assert {type(m) for m in one.modules() if isinstance(m, nn.Dropout)} == {Dropout}
    assert loaded.state_dict().keys() == saved.state_dict().keys()
