"""LayerGate: identity at 0, the layer at 1, also for tuples, keywords, recomputed layers and copies."""

import copy
import warnings

import pytest
import torch
from torch import nn

from compressft.model.anatomy import anatomy
from compressft.model.surgery import checkpoint_activations
from compressft.modules.gate import ColumnGate
from compressft.modules.linear import dense
from compressft.modules.part_gate import LayerGate, StreamMask
from tests.tiny import TINY, batch_for, logits, tiny


class Doubler(nn.Module):
    """A layer that gives a tensor or a tuple."""

    def __init__(self, tuples):
        super().__init__()
        self.tuples = tuples

    def forward(self, hidden_states):
        return (2 * hidden_states, "cache") if self.tuples else 2 * hidden_states


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_mixture(value, tuples, keyword, measured):
    layer = Doubler(tuples)
    LayerGate(ColumnGate(1, 1)).attach(layer)
    gate = layer.layer_gate.gate
    gate.mask.fill_(value)
    gate.measure(measured)
    x = torch.randn(3, 4)
    out = layer(hidden_states=x) if keyword else layer(x)
    if tuples:
        out, rest = out
        assert rest == "cache"
    torch.testing.assert_close(out, (1.0 + value) * x)
    if measured:
        out.sum().backward()
        torch.testing.assert_close(gate.mask.grad[0], x.sum())
    with dense():
        assert torch.equal(layer(x)[0] if tuples else layer(x), 2 * x)
    LayerGate.detach(layer)
    assert torch.equal(layer(x)[0] if tuples else layer(x), 2 * x)
    assert not dict(layer.named_modules()).keys() - {""} and not layer._forward_hooks_with_kwargs


@pytest.mark.parametrize("family", TINY)
def test_a_closed_layer_is_the_residual_alone(family):
    model, seen = tiny(family), {}
    layers = anatomy(model).layers
    for layer in layers:
        LayerGate(ColumnGate(1, 1)).attach(layer.module)
    layers[1].module.layer_gate.gate.mask.zero_()

    def watch(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        seen["same"] = torch.equal(out, args[0])

    layers[1].module.register_forward_hook(watch)
    logits(model, batch_for(family))
    assert seen["same"]


def test_hidden_states_are_recorded_behind_the_gate():
    model, batch = tiny("llama"), batch_for("llama")
    with torch.no_grad():
        model(**batch, output_hidden_states=True)
        LayerGate(ColumnGate(1, 1)).attach(anatomy(model).layers[0].module)
        anatomy(model).layers[0].module.layer_gate.gate.mask.zero_()
        states = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_recomputed_layers_have_the_same_gradient(family):
    grads = []
    for checkpointing in (False, True):
        model, batch = tiny(family), batch_for(family)
        for layer in anatomy(model).layers:
            LayerGate(ColumnGate(1, 1)).attach(layer.module)
            layer.module.layer_gate.gate.measure(True)
        if checkpointing:
            model.config.use_cache = False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                checkpoint_activations(model)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()(**batch).logits.square().sum().backward()
        grads.append([layer.module.layer_gate.gate.mask.grad for layer in anatomy(model).layers])
    assert all(g.abs() > 0 for g in grads[0])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_copies_have_gates_of_their_own():
    model, batch = tiny(), batch_for("bert")
    for layer in anatomy(model).layers:
        LayerGate(ColumnGate(1, 1)).attach(layer.module)
    want = logits(model, batch)
    other = copy.deepcopy(model)
    anatomy(other).layers[0].module.layer_gate.gate.mask.zero_()
    assert torch.equal(logits(model, batch), want) and not torch.equal(logits(other, batch), want)
    for layer in anatomy(other).layers:
        LayerGate.detach(layer.module)
    assert torch.equal(logits(other, batch), want) and hasattr(anatomy(model).layers[0].module, "layer_gate")


def test_stream_mask_knows_dead_from_fractional():
    gate = ColumnGate(4, 1)
    gate.mask.copy_(torch.tensor([1.0, 0.0, 0.3, 1.0]))
    mask, weight = StreamMask(gate), torch.randn(2, 4)
    assert mask.columns().tolist() == [1.0, 0.0, 1.0, 1.0]
    assert torch.equal(mask(weight), weight * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert not list(mask.parameters()) and not mask.state_dict()
