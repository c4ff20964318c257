"""GatedNorm: the arithmetic of the norm that remains, whatever the dead dimensions hold."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressft.modules.bottleneck import AdaptedNorm, Bottleneck, BottleneckDesign
from compressft.modules.gate import ColumnGate
from compressft.modules.linear import dense
from compressft.modules.norm import GatedNorm
from tests.tiny import tiny

WIDTH = 7
LIVE = [0, 2, 3, 6]


def norms():
    """A LayerNorm, one with a Pfeiffer adapter, and an RMSNorm as Llama has it, all with uneven parameters."""
    generator = torch.Generator().manual_seed(0)
    adapter = Bottleneck(BottleneckDesign(WIDTH, 3, "gelu"), "bert", generator)
    layer, adapted = nn.LayerNorm(WIDTH, eps=1e-3), AdaptedNorm.of(nn.LayerNorm(WIDTH, eps=1e-3), adapter)
    rms = copy.deepcopy(tiny("llama").model.norm)
    rms.weight = nn.Parameter(torch.ones(WIDTH))
    for norm in (layer, adapted, rms):
        for parameter in norm.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {"layer": layer, "adapted": adapted, "rms": rms}


def gate_of(*values):
    gate = ColumnGate(WIDTH, 1)
    gate.mask.copy_(torch.tensor(values))
    return gate


def some_input(seed=0):
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["layer", "adapted", "rms"])
def test_all_alive_is_the_norm_itself(kind):
    norm, x = norms()[kind], some_input()
    gated = GatedNorm.of(norm, gate_of(*[1.0] * WIDTH))
    torch.testing.assert_close(gated(x), norm(x), atol=1e-6, rtol=1e-6)
    assert {n for n, _ in gated.named_parameters()} == {n for n, _ in norm.named_parameters()}
    assert all(a is b for a, b in zip(gated.parameters(), norm.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_live_dimensions_are_normed_among_themselves(kind):
    norm, x = norms()[kind], some_input()
    gated = GatedNorm.of(norm, gate_of(*[float(i in LIVE) for i in range(WIDTH)]))
    weight = norm.weight[LIVE]
    if kind == "layer":
        want = F.layer_norm(x[..., LIVE], (len(LIVE),), weight, norm.bias[LIVE], norm.eps)
    else:
        want = F.rms_norm(x[..., LIVE], (len(LIVE),), weight, norm.variance_epsilon)
    got = gated(x)
    torch.testing.assert_close(got[..., LIVE], want, atol=1e-6, rtol=1e-6)
    dead = [i for i in range(WIDTH) if i not in LIVE]
    assert (got[..., dead] == 0).all()
    x[..., dead] = 1e6
    assert torch.equal(gated(x), got), "what dead dimensions hold does not matter"


@pytest.mark.parametrize("kind", ["layer", "adapted", "rms"])
def test_gradients(kind):
    """By finite differences in fp64; the gate's own is that of its factor alone, at live and at dead dimensions."""
    norm, x = norms()[kind].double(), some_input().double().requires_grad_()
    if kind == "adapted":
        # Its kernel computes in fp32; the norm around it is what is tested.
        norm.adapter = nn.Identity()
        norm.adapter.forward = lambda x, residual: residual + x.tanh()
    gate = gate_of(1.0, 0.0, 0.4, 1.0, 0.0, 0.7, 1.0).double()
    gated = GatedNorm.of(norm, gate)
    assert torch.autograd.gradcheck(lambda x, *_: gated(x), (x, *gated.parameters()))
    if kind == "adapted":
        return
    gate.mask.requires_grad_()
    direction = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (gated(x) * direction).sum().backward()
    with torch.no_grad():
        values = gate.mask.detach()
        mean = (x * (values != 0)).sum(-1, keepdim=True) / 5 if kind == "layer" else 0.0
        var = ((x - mean).square() * (values != 0)).sum(-1, keepdim=True) / 5
        eps = norm.eps if kind == "layer" else norm.variance_epsilon
        y = (x - mean) / (var + eps).sqrt() * norm.weight + (norm.bias if kind == "layer" else 0.0)
    torch.testing.assert_close(gate.mask.grad, (direction * y).sum((0, 1)))
    assert (gate.mask.grad[[1, 4]] != 0).all(), "a dead dimension may return"


@pytest.mark.parametrize("kind", ["layer", "adapted", "rms"])
def test_restore_folds_the_factor(kind):
    norm, x = norms()[kind], some_input()
    gated = GatedNorm.of(norm, gate_of(0.3, 1.0, 0.9, 0.8, 0.2, 1.0, 0.5))
    want = gated(x)
    back = gated.restore()
    assert back is norm
    torch.testing.assert_close(back(x), want, atol=1e-6, rtol=1e-6)


def test_dense_acts_as_if_nothing_were_gated():
    norm, x = norms()["layer"], some_input()
    gated = GatedNorm.of(norm, gate_of(*[float(i in LIVE) for i in range(WIDTH)]))
    with dense():
        assert torch.equal(gated(x), norm(x))
    assert not torch.equal(gated(x), norm(x))


def test_copies_are_independent():
    owner = nn.ModuleDict({"norm": norms()["layer"], "gate": gate_of(*[1.0] * WIDTH)})
    owner["norm"] = GatedNorm.of(owner["norm"], owner["gate"])
    other = copy.deepcopy(owner)
    other["gate"].mask[1] = 0.0
    x = some_input()
    assert (other["norm"](x)[..., 1] == 0).all() and not (owner["norm"](x)[..., 1] == 0).any()
    assert other["norm"].restore().weight is other["norm"].weight
