"""Bottleneck, AdaptedOutput and AdaptedNorm: formulas, initialisation bounds, own generator, shared LayerNorm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressft.modules import bottleneck as module
from compressft.modules.bottleneck import AdaptedNorm, AdaptedOutput, Bottleneck, BottleneckDesign


def bottleneck(init="houlsby", activation="gelu_tanh", width=256, size=64, seed=0):
    return Bottleneck(BottleneckDesign(width, size, activation), init, torch.Generator().manual_seed(seed))


def test_houlsby_initialisation_is_truncated_at_two_deviations():
    adapter = bottleneck()
    for weight in (adapter.down_weight, adapter.up_weight):
        assert weight.abs().max() <= 2e-3
        # A normal of std 1e-3 cut at two deviations has std 0.88e-3 and comes near its bounds.
        assert weight.abs().max() > 1.99e-3 and weight.std().item() == pytest.approx(0.88e-3, rel=0.02)
    assert adapter.down_bias.eq(0).all() and adapter.up_bias.eq(0).all()


def test_bert_initialisation():
    adapter = bottleneck("bert")
    for weight in (adapter.down_weight, adapter.up_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02) and weight.abs().max() > 0.05


@pytest.mark.parametrize("init", ["houlsby", "bert"])
def test_draws_from_its_own_generator(init):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second, other = bottleneck(init), bottleneck(init), bottleneck(init, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.down_weight, other.down_weight)
    assert not torch.equal(first.down_weight, first.up_weight.t())


def test_parameter_count():
    assert sum(p.numel() for p in bottleneck(width=48, size=6).parameters()) == 2 * 48 * 6 + 48 + 6


@torch.no_grad()
def test_forward_and_residual():
    adapter, x = bottleneck("bert", "relu", 16, 4), torch.randn(3, 16)
    inner = F.relu(x @ adapter.down_weight.t() + adapter.down_bias) @ adapter.up_weight.t() + adapter.up_bias
    torch.testing.assert_close(adapter(x), x + inner)
    torch.testing.assert_close(adapter(x, residual=10 * x), 10 * x + inner)
    wrapped = AdaptedOutput(nn.ReLU(), adapter)
    torch.testing.assert_close(wrapped(x), adapter(F.relu(x)))


@torch.no_grad()
def test_adapted_norm_is_pfeiffers_formula():
    norm = nn.LayerNorm(16, eps=1e-12)
    norm.weight.copy_(torch.randn(16))
    norm.bias.copy_(torch.randn(16))
    adapter, z = bottleneck("bert", "relu", 16, 4), torch.randn(3, 16)
    ours = AdaptedNorm.of(norm, adapter)
    assert ours.weight is norm.weight and ours.bias is norm.bias and ours.eps == 1e-12
    inner = F.relu(norm(z) @ adapter.down_weight.t() + adapter.down_bias) @ adapter.up_weight.t() + adapter.up_bias
    torch.testing.assert_close(ours(z), norm(z + inner))
    adapter.up_weight.zero_()
    assert torch.equal(ours(z), norm(z))


def saved(call, *own):
    """Storages that autograd keeps for the backward pass, by address, those of `own` left out."""
    addresses, found = {tensor.untyped_storage().data_ptr() for tensor in own}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in addresses:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return found


def test_adapted_norm_keeps_no_more_than_the_formula_needs():
    norm = nn.LayerNorm(16).requires_grad_(False)
    adapter, z = bottleneck("bert", "relu", 16, 4), torch.randn(64, 16, requires_grad=True)
    ours = AdaptedNorm.of(norm, adapter)
    kept = saved(lambda: ours(z), *ours.parameters())
    # z, LN(z), relu(down) and what the second LayerNorm reads; a mean and a deviation for each row of both.
    assert sum(kept.values()) <= 4 * 64 * (3 * 16 + 4 + 2 * 2)


def test_adapted_norm_gives_its_norm_to_the_kernel(monkeypatch):
    """One operator then normalises and projects, and LN(z) need not be kept."""
    given = []

    def kernel(x, *weights, norm, residual, **options):
        given.append((x, residual, norm))
        return residual

    monkeypatch.setattr(module, "adapter_kernel", kernel)
    norm = nn.LayerNorm(16)
    ours, z = AdaptedNorm.of(norm, bottleneck("bert", "relu", 16, 4)), torch.randn(3, 16)
    assert torch.equal(ours(z), norm(z))
    ((x, residual, (gamma, beta, eps)),) = given
    assert x is z and residual is z and gamma is norm.weight and beta is norm.bias and eps == norm.eps
