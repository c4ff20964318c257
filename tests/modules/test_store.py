"""NF4 storage of a linear layer's weight: bytes, values, gradients next to gates, deltas and adapters, unpacking."""

import copy

import pytest
import torch
from compressft_kernels import NF4
from torch import nn
from torch.nn import functional as F

from compressft.modules.gate import ColumnGate, MaskGate, ScoreGate
from compressft.modules.linear import CompressedLinear, dense
from compressft.modules.store import NF4Store, double_quantise


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(rows=24, columns=50, double=True):
    linear = CompressedLinear(columns, rows)
    with torch.no_grad():
        linear.weight.copy_(draw(rows, columns))
        linear.weight[3] = 0.0
    linear.requires_grad_(False)
    linear.pack(NF4Store(linear.weight, double))
    return linear


@pytest.mark.parametrize(("double", "limit"), [(False, 0.5628), (True, 0.53)])
def test_bytes_per_weight(double, limit):
    linear = packed(768, 512, double)
    held = sum(t.nbytes for name, t in linear.state_dict(keep_vars=True).items() if name != "bias")
    assert 0.5 < held / (768 * 512) < limit
    assert "weight" not in dict(linear.named_parameters()) and "weight" not in linear.state_dict()


def test_values_are_the_kernels():
    weight = draw(24, 50)
    store = NF4Store(weight, double=False)
    reference = NF4.quantise(weight)
    assert torch.equal(store.packed, reference.packed) and torch.equal(store.absmax, reference.absmax)
    assert store().shape == (24, 50) and store().dtype == torch.float32
    # No two codes are farther apart than 0.304 of the block's greatest value.
    peak = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1).repeat_interleave(64)
    assert ((store() - weight).abs().flatten() <= 0.153 * peak[: weight.numel()]).all()
    again = NF4Store(store(), double=False)
    assert torch.equal(again(), store())


def test_scales_are_quantised_to_within_half_a_code():
    scales = 1.0 + draw(1000).abs()
    codes, absmax2, code2, offset = double_quantise(scales)
    back = code2[codes.long()] * absmax2.repeat_interleave(256)[:1000] + offset
    assert codes.dtype == torch.uint8 and len(absmax2) == 4
    assert ((back - scales).abs() <= absmax2.repeat_interleave(256)[:1000] / 255 * 1.001).all()


@pytest.mark.parametrize("double", [True, False])
def test_zeros_are_exact(double):
    assert (NF4Store(torch.zeros(4, 32), double)() == 0).all()
    assert (packed(double=double).weight[3] == 0).all()


GATES = {
    "none": lambda: None,
    "mask": lambda: kept(MaskGate(24, 50), draw(24, 50, seed=5) > 0),
    "scores": lambda: ScoreGate(24, 50),
    "tiles": lambda: ScoreGate(24, 50, (4, 5)),
    "columns": lambda: kept(ColumnGate(10, 5), torch.tensor([0, 3, 7])),
}


def kept(gate, what):
    gate.keep(what)
    return gate


class Delta(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Parameter(draw(24, 2, seed=11))

    def forward(self):
        return self.left @ draw(2, 50, seed=12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
def test_acts_as_its_dequantised_weight(gate, delta):
    """Output and gradients are those of a dense frozen layer with the dequantised values."""
    ours = packed()
    plain = CompressedLinear(50, 24)
    plain.weight = nn.Parameter(ours.weight.clone(), requires_grad=False)
    plain.bias = nn.Parameter(ours.bias.detach().clone(), requires_grad=False)
    found = []
    for linear in (ours, plain):
        if GATES[gate]():
            linear.gates["any"] = GATES[gate]()
        linear.delta = Delta() if delta else None
        x = draw(3, 7, 50, seed=6).requires_grad_()
        y = linear(x)
        (y * draw(3, 7, 24, seed=8)).sum().backward()
        grads = [p.grad for p in linear.parameters() if p.requires_grad]
        found.append([y.detach(), x.grad, *grads])
        with dense():
            found[-1].append(linear(x).detach())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_keeps_no_dense_weight_for_the_backward(masked):
    linear = packed(64, 256)
    if masked:
        linear.gates["mask"] = MaskGate(64, 256)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(draw(5, 256).requires_grad_())
    assert saved and max(t.nbytes for t in saved) <= 64 * 256 // 2


def test_unpacks_to_the_same_values():
    linear, x = packed(), draw(5, 50, seed=6)
    linear.gates["mask"] = GATES["mask"]()
    want, weight = linear(x), linear.weight
    copied = copy.deepcopy(linear)
    linear.unpack()
    assert isinstance(linear.weight, nn.Parameter) and torch.equal(linear.weight, weight)
    assert not linear.weight.requires_grad and linear.store is None
    torch.testing.assert_close(linear(x), want)
    copied.fold()
    assert copied.store is None and torch.equal(copied.weight, weight * GATES["mask"]().mask)
    linear.unpack()


def test_a_packed_layer_cannot_be_restored():
    with pytest.raises(ValueError, match=r"\['store'\] are filled"):
        packed().restore()
