"""CompressedLinear: W_eff = quantise(gate * (W + delta)), `dense()`, folding, and taking over plain layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from compressft.modules.gate import ColumnGate
from compressft.modules.int8 import LayerRounding, activation_scale, portable_scale, quantised_linear
from compressft.modules.linear import CompressedLinear, dense, is_dense
from compressft.modules.quantizer import Int8Quantizer


class Delta(nn.Module):
    """A low-rank change of the weight, as any delta method would put there."""

    def __init__(self, rows, columns):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.left = nn.Parameter(torch.randn(rows, 2, generator=generator))
        self.right = nn.Parameter(torch.randn(2, columns, generator=generator))

    def forward(self):
        return self.left @ self.right


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x + 1


KEPT = torch.tensor([0, 2, 3])


def filled(quantizer=True):
    linear = CompressedLinear(12, 6)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(6, 12, generator=torch.Generator().manual_seed(0)))
        linear.bias.copy_(torch.randn(6, generator=torch.Generator().manual_seed(1)))
    linear.delta = Delta(6, 12)
    linear.gates["structured"] = ColumnGate(4, 3)
    linear.gates["structured"].keep(KEPT)
    if quantizer:
        linear.quantizer = Int8Quantizer()
        linear.quantizer.observe(inputs(), None)
    return linear.eval()


def inputs():
    return torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(3))


MASK = torch.tensor([1.0, 0.0, 1.0, 1.0]).repeat_interleave(3)


@torch.no_grad()
def test_order_is_delta_then_gate_then_quantisation():
    linear, x = filled(), inputs()
    weight = (linear.weight + linear.delta()) * MASK
    scale = activation_scale(x.min(), x.max())
    assert torch.equal(linear.effective_weight(), weight)
    # Pairs are formed of the columns that stay.
    w_scale = portable_scale(weight[:, MASK.bool()])
    assert torch.equal(linear(x), quantised_linear(x, weight, linear.bias, scale, LayerRounding(w_scale)))
    # Other orders give other results, so that this comparison means something.
    late_gate = quantised_linear(x * MASK, linear.weight + linear.delta(), linear.bias, scale)
    late_delta = quantised_linear(x, linear.weight * MASK, linear.bias, scale) + F.linear(x, linear.delta())
    assert not torch.equal(late_gate, linear(x)) and not torch.allclose(late_delta, linear(x), atol=1e-2)


@torch.no_grad()
def test_adapter_acts_on_the_output():
    linear, x = filled(), inputs()
    before = linear(x)
    linear.adapter = Twice()
    assert torch.equal(linear(x), 2 * before + 1)


@torch.no_grad()
def test_folding_keeps_the_function_and_the_sparsity():
    linear, x = filled(), inputs()
    want = linear(x)
    linear.fold()
    assert len(linear.gates) == 0 and linear.delta is None and linear.quantizer is not None
    # The delta is dense and would have filled the dropped columns.
    assert torch.equal(linear.weight != 0, MASK.bool().expand(6, 12))
    # As `shrink` leaves it.
    linear.weight.data = linear.weight[:, MASK.bool()]
    assert torch.equal(linear(x[..., MASK.bool()]), want)


def test_gradients_reach_weight_delta_and_gate():
    linear, x = filled(quantizer=False), inputs()
    linear.gates["structured"].measure(True)
    out = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(4))
    (linear(x) * out).sum().backward()
    dw = torch.einsum("btn,btk->nk", out.double(), x.double())
    torch.testing.assert_close(linear.weight.grad.double(), dw * MASK, atol=1e-4, rtol=1e-5)
    left = (dw * MASK) @ linear.delta.right.detach().double().t()
    torch.testing.assert_close(linear.delta.left.grad.double(), left, atol=1e-4, rtol=1e-5)
    gate = (dw * (linear.weight + linear.delta()).detach()).sum(0).view(4, 3).sum(1)
    torch.testing.assert_close(linear.gates["structured"].mask.grad.double(), gate, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_dense_shows_the_uncompressed_weights_and_nests():
    linear, x = filled(), inputs()
    want = F.linear(x, linear.weight + linear.delta(), linear.bias)
    compressed = linear(x)
    with dense():
        assert is_dense() and torch.equal(linear(x), want)
        with dense():
            assert torch.equal(linear(x), want)
        assert is_dense() and torch.equal(linear(x), want)
    assert not is_dense() and torch.equal(linear(x), compressed)
    with pytest.raises(RuntimeError), dense():
        raise RuntimeError
    assert not is_dense()


def test_dense_does_not_observe():
    linear = filled().train()
    with dense():
        linear(100 * inputs())
    assert int(linear.quantizer.batches) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_takes_over_and_gives_back_a_linear(bias):
    plain = nn.Linear(5, 3, bias=bias).eval()
    ours = CompressedLinear.of(plain)
    assert CompressedLinear.of(ours) is ours
    assert ours.weight is plain.weight and ours.bias is plain.bias and not ours.training
    assert ours.state_dict().keys() == plain.state_dict().keys()
    back = ours.restore()
    assert type(back) is nn.Linear and back.weight is plain.weight and back.bias is plain.bias
    assert (back.in_features, back.out_features, back.training) == (5, 3, False)


@torch.no_grad()
def test_takes_over_and_gives_back_a_conv1d():
    plain = Conv1D(3, 5).eval()
    nn.init.normal_(plain.bias)
    x = inputs()[..., :5]
    ours = CompressedLinear.of(plain)
    assert ours.transposed and ours.weight.shape == (3, 5)
    torch.testing.assert_close(ours(x), plain(x))
    back = ours.restore()
    assert type(back) is Conv1D and (back.nf, back.nx) == (3, 5)
    assert torch.equal(back.weight, plain.weight) and torch.equal(back(x), plain(x))


def test_filled_slots_cannot_be_restored():
    with pytest.raises(ValueError, match=r"\['gates', 'delta', 'quantizer'\] are filled"):
        filled().restore()
