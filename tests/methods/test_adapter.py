"""Adapters: near-identity, exact identity with a zero up-projection, formulas in place, trainable sets, sizes."""

from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from compressft.anatomy import anatomy
from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model import count
from compressft.transform import Context, trainable
from tests.tiny import TINY, batch_for, logits, padded, tiny

HOULSBY = Adapter(placement="houlsby", size=8)
PFEIFFER = Adapter(placement="pfeiffer", size=8)


def prepared(method, family="bert", **settings):
    model = tiny(family, **settings)
    method.prepare(model, Context())
    return model


def zero_up(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter.up_" in name:
                parameter.zero_()


@pytest.mark.parametrize("family", TINY)
def test_houlsby_starts_near_identity(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(Adapter(), family)
    got = logits(model, batch)
    assert not torch.equal(got, want)
    assert (got - want).norm() < 1e-3 * want.norm()
    zero_up(model)
    # GPT-2's output projection computes its product in another order once it is a CompressedLinear.
    tolerance = 1e-5 if family == "gpt2" else 0
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", TINY)
def test_pfeiffer_with_zero_up_is_exact(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(PFEIFFER, family)
    assert not torch.equal(logits(model, batch), want)
    zero_up(model)
    assert torch.equal(logits(model, batch), want)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def layer_norms(model):
    with Count() as counted:
        logits(model, padded())
    return counted.calls[torch.ops.aten.native_layer_norm]


def test_pfeiffer_applies_the_layer_norm_twice():
    assert layer_norms(tiny()) == 5
    assert layer_norms(prepared(PFEIFFER)) == 5 + 2
    assert layer_norms(prepared(HOULSBY)) == 5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_one_block_changes_only_what_comes_after(family, placement):
    model = prepared(Adapter(placement=placement, size=8), family)
    batch = batch_for(family)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))

    def states():
        with torch.no_grad():
            return model(**batch, output_hidden_states=True).hidden_states

    before = states()
    with torch.no_grad():
        for name, parameter in anatomy(model).layers[1].module.named_parameters():
            if "adapter." in name:
                parameter.zero_()
    after = states()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2], atol=1e-3)


def test_pre_norm_pfeiffer_adds_to_the_ffn_output():
    """In a pre-norm layer: h + f + up(act(down(f))), f the FFN's output."""
    plain, model = tiny("llama"), prepared(PFEIFFER, "llama")
    ffn, after = {}, {}
    plain.model.layers[0].mlp.register_forward_hook(lambda m, a, out: ffn.setdefault("f", out))
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: after.setdefault("f", out))
    logits(plain, padded())
    logits(model, padded())
    adapter = model.model.layers[0].mlp.down_proj.adapter
    f = ffn["f"]
    want = f + torch.relu(f @ adapter.down_weight.t() + adapter.down_bias) @ adapter.up_weight.t() + adapter.up_bias
    torch.testing.assert_close(after["f"], want.detach(), atol=1e-5, rtol=1e-5)


HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
PARTS = ("down_weight", "down_bias", "up_weight", "up_bias")


def test_houlsby_trainable_set(check_training):
    layer = "bert.encoder.layer"
    places = [f"{layer}.{i}.{place}.dropout.adapter" for i in (0, 1) for place in ("attention.output", "output")]
    norms = ["bert.embeddings", *(f"{layer}.{i}.{place}" for i in (0, 1) for place in ("attention.output", "output"))]
    expected = HEAD | {f"{place}.{part}" for place in places for part in PARTS}
    expected |= {f"{norm}.LayerNorm.{part}" for norm in norms for part in ("weight", "bias")}
    check_training(tiny(), HOULSBY, expected)


def test_pfeiffer_trainable_set(check_training):
    places = [f"bert.encoder.layer.{i}.output.LayerNorm.adapter" for i in (0, 1)]
    check_training(tiny(), PFEIFFER, HEAD | {f"{place}.{part}" for place in places for part in PARTS})


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen3", 9), ("gpt2", 10), ("distilbert", 10)])
def test_houlsby_trains_every_norm_of_other_families(family, norms):
    model = prepared(HOULSBY, family)
    names = [n for n, _ in trainable(model) if "norm" in n.lower() or ".ln_" in n]
    assert len(names) == norms


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("method", [HOULSBY, PFEIFFER])
def test_parameter_count(family, method):
    d, m = 32, 8
    bottlenecks = 2 * (2 if method is HOULSBY else 1)
    model = prepared(method, family)
    assert count(model)["total"] == count(tiny(family))["total"] + bottlenecks * (2 * d * m + d + m)


def test_sizes():
    assert Adapter().bottleneck_size(768) == 64
    assert Adapter(placement="pfeiffer").bottleneck_size(768) == 48
    assert Adapter(reduction_factor=4).bottleneck_size(768) == 192
    assert Adapter(placement="pfeiffer", size=5).bottleneck_size(768) == 5
    with pytest.raises(UserError, match=r"method\.reduction_factor: 5 does not divide the hidden size 768"):
        Adapter(reduction_factor=5).bottleneck_size(768)
    with pytest.raises(ValidationError, match="both set; give one"):
        Adapter(size=4, reduction_factor=4)


def test_initialisation_and_activation_follow_the_placement():
    houlsby, pfeiffer = prepared(Adapter(size=64)), prepared(Adapter(placement="pfeiffer", size=64))
    first = houlsby.bert.encoder.layer[0].output.dropout.adapter
    second = pfeiffer.bert.encoder.layer[0].output.LayerNorm.adapter
    assert first.activation == "gelu_tanh" and first.down_weight.abs().max() <= 2e-3
    assert second.activation == "relu" and second.down_weight.std().item() == pytest.approx(0.02, rel=0.1)
    other = prepared(Adapter(size=4, activation="silu")).bert.encoder.layer[0].output.dropout.adapter
    assert other.activation == "silu"


def test_seed_decides_the_adapters():
    def weights(seed):
        model = tiny()
        HOULSBY.prepare(model, Context(seed=seed))
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".adapter." in n])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    first = weights(1).view(4, -1)
    assert not torch.equal(first[0], first[1]), "every adapter is drawn anew"
