"""The coupling block: its inverse, its determinant, zero networks, odd widths, its size."""

import pytest
import torch

from compressft.modules.invertible import Invertible


def coupling(width=8, size=2, activation="relu", **settings):
    new = Invertible(width, size, activation, **settings)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in new.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return new


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 9, 2])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_inverse_undoes_it(width, dtype, limit):
    block = coupling(width).to(dtype)
    x = torch.randn(5, 3, width, dtype=dtype)
    assert (block(x) - x).abs().max() > 0.1
    for there, back in ((block, block.inverse), (block.inverse, block)):
        assert (back(there(x)) - x).abs().max() <= limit * x.abs().max() * 10


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_determinant_is_one(activation):
    block = coupling(activation=activation).double()
    x = torch.randn(8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: block(v[None])[0], x)
    assert torch.det(jacobian).item() == pytest.approx(1.0, abs=1e-9)
    assert not torch.allclose(jacobian, torch.eye(8, dtype=torch.float64), atol=1e-2)


@torch.no_grad()
def test_the_formula():
    block, x = coupling(), torch.randn(4, 8)
    e1, e2 = x.chunk(2, -1)

    def network(layers, v):
        return torch.relu(v @ layers[0].weight.t() + layers[0].bias) @ layers[1].weight.t() + layers[1].bias

    o1 = e1 + network(block.f, e2)
    torch.testing.assert_close(block(x), torch.cat([o1, e2 + network(block.g, o1)], -1))


@torch.no_grad()
def test_a_zero_second_layer_is_the_identity():
    block, x = Invertible(32, 8, "relu", zero=True), torch.randn(3, 32)
    assert torch.equal(block(x), x) and torch.equal(block.inverse(x), x)
    other = Invertible(32, 8, "relu")
    assert other.f[1].weight.std().item() == pytest.approx(0.02, rel=0.3) and other.g[1].bias.eq(0).all()
    assert not torch.equal(other(x), x)


def test_size_of_the_papers_block():
    """d = 768, reduction 2: 296,064 values."""
    assert sum(p.numel() for p in Invertible(768, 192, "relu").parameters()) == 296_064


def test_gradients_reach_both_networks():
    block = coupling(activation="tanh").double()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: block(v), (x,))
    assert torch.autograd.gradcheck(block.inverse, (x,))
    block.inverse(torch.randn(2, 8, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_describes_itself():
    block = Invertible(9, 3, "tanh")
    again = Invertible.rebuild(None, block.describe())
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in block.named_parameters()}
    assert again.describe() == block.describe()


def test_draws_from_its_own_generator():
    state = torch.get_rng_state()
    one, two = (Invertible(8, 2, "relu", generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
