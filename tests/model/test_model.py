"""Model surgery: masked equals pruned for every family, importance, counts, fold, restore, resize, freeze, load."""

import pytest
import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.load import load_model
from compressft.model.shrink import resize, shapes, shrink
from compressft.model.source import resolve
from compressft.model.surgery import (
    checkpoint_activations,
    compress_linear,
    freeze,
    head_parameters,
    replace,
    restore_plain,
)
from compressft.modules.gate import ColumnGate
from compressft.modules.linear import CompressedLinear
from tests.tiny import TINY, batch_for, gated, logits, padded, random_keep, tiny


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_equals_pruned(family, seed):
    masked, pruned = tiny(family), tiny(family)
    batch = batch_for(family)
    dense = logits(masked, batch)
    keep = random_keep(masked, seed)
    gated(masked, keep)
    shrink(pruned, keep)
    want = logits(masked, batch)
    assert (want - dense).abs().max() > 1e-2, "the gates change nothing: the comparison would prove nothing"
    torch.testing.assert_close(logits(pruned, batch), want, atol=1e-5, rtol=1e-5)
    assert shapes(pruned) == [
        {"heads": len(k["heads"]) * x["heads"] // x["kv_heads"], "kv_heads": len(k["heads"]), "ffn": len(k["ffn"])}
        for k, x in zip(keep, shapes(masked), strict=True)
    ]


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2"])
def test_folded_gates_then_shrink_equals_masked(family):
    model = tiny(family)
    batch, keep = batch_for(family), random_keep(model)
    gated(model, keep)
    want = logits(model, batch)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.fold()
    torch.testing.assert_close(logits(model, batch), want, atol=0, rtol=0)
    shrink(model, keep)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    restore_plain(model)
    assert not any(isinstance(m, CompressedLinear) for m in model.modules())
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_keeping_everything_changes_nothing(family):
    model = tiny(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shrink(model, [{"heads": torch.arange(x["kv_heads"]), "ffn": torch.arange(x["ffn"])} for x in shapes(model)])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shrink_wants_one_entry_per_layer():
    with pytest.raises(ValueError, match="1 layers given, the model has 2"):
        shrink(tiny(), [{}])


def test_shrink_keeps_frozen_frozen():
    model = tiny()
    freeze(model)
    shrink(model, random_keep(model))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("family", TINY)
def test_parameter_count_follows_the_formula(family):
    model = tiny(family)
    before = count(model)["total"]
    layers = anatomy(model).layers
    keep = random_keep(model)
    removed = 0
    for layer, kept in zip(layers, keep, strict=True):
        width = 32
        kv_rows = (layer.kv_heads - len(kept["heads"])) * layer.head_dim
        q_rows = kv_rows * layer.heads // layer.kv_heads
        bias = family not in ("llama", "mistral", "qwen2", "qwen3")
        qkv_bias = bias or family == "qwen2"
        removed += (q_rows + 2 * kv_rows) * (width + qkv_bias) + q_rows * width
        neurons = layer.ffn - len(kept["ffn"])
        removed += neurons * (len(layer.family.up) * (width + bias) + width)
    shrink(model, keep)
    assert removed > 0
    assert count(model)["total"] == before - removed


def test_count_trainable_and_nonzero():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model[0].weight[1] = 0.0
    freeze(model, ["1"])
    assert count(model) == {"total": 26, "trainable": 16, "nonzero": 23}


# Llama's RMSNorm computes in fp32 whatever its input is: its difference quotient needs a wide step.
@pytest.mark.parametrize(
    ("family", "step", "tolerance"), [("bert", 1e-6, 1e-5), ("gpt2", 1e-6, 1e-5), ("llama", 1e-2, 1e-2)]
)
def test_gate_gradient_equals_finite_difference(family, step, tolerance):
    """In float64; the gate's gradient is the first-order importance before the absolute value."""
    model = tiny(family)
    keep = random_keep(model)
    gated(model, keep)
    model.double()
    batch = batch_for(family)
    weights = torch.randn(model(**batch).logits.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss():
        return (torch.log_softmax(model(**batch).logits, -1) * weights * batch["attention_mask"].sum()).sum() / 100

    gates = [m for m in model.modules() if isinstance(m, ColumnGate)]
    assert len(gates) == 4
    for gate in gates:
        gate.measure(True)
    loss().backward()
    for gate in gates:
        for group in (0, len(gate.mask) - 1):
            grad = gate.mask.grad[group].item()
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    gate.mask[group] += sign * step
                    values.append(loss().item())
                    gate.mask[group] -= sign * step
            assert grad == pytest.approx((values[0] - values[1]) / (2 * step), rel=tolerance, abs=tolerance)
    # Dropped groups get a gradient too: they may return.
    assert all((gate.mask.grad != 0).all() for gate in gates if gate.size == 1)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_dead_head_has_no_importance(family):
    model = tiny(family)
    layer = anatomy(model).layers[0]
    everything = [{"heads": torch.arange(x.kv_heads), "ffn": torch.arange(x.ffn)} for x in anatomy(model).layers]
    gated(model, everything)
    linear = anatomy(model).layers[0].part(layer.family.o)
    with torch.no_grad():
        linear.weight[:, linear.gates["structured"].size : 2 * linear.gates["structured"].size] = 0.0
    linear.gates["structured"].measure(True)
    model(**batch_for(family)).logits.square().sum().backward()
    linear.gates["structured"].accumulate(0.0)
    alive = torch.ones(layer.kv_heads, dtype=torch.bool)
    alive[1] = False
    assert linear.gates["structured"].importance[1] == 0
    assert (linear.gates["structured"].importance[alive] > 0).all()
    assert linear.gates["structured"].mask.grad is None


@pytest.mark.parametrize("family", TINY)
def test_compress_and_restore_round_trip(family):
    model = tiny(family)
    batch = batch_for(family)
    want = logits(model, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    for layer in anatomy(model).layers:
        for path in layer.linears:
            new = compress_linear(model, f"{layer.name}.{path}")
            assert compress_linear(model, f"{layer.name}.{path}") is new
            assert new.transposed == (family == "gpt2")
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    restore_plain(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_restore_keeps_frozen_and_mode(family):
    model = tiny(family)
    freeze(model)
    for layer in anatomy(model).layers:
        for path in layer.linears:
            compress_linear(model, f"{layer.name}.{path}")
    restore_plain(model)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("family", TINY)
def test_resize_then_load(family):
    pruned = tiny(family)
    shrink(pruned, random_keep(pruned, seed=3))
    fresh = tiny(family, seed=9)
    resize(fresh, shapes(pruned))
    fresh.load_state_dict(pruned.state_dict())
    batch = batch_for(family)
    assert torch.equal(logits(fresh, batch), logits(pruned, batch))


def test_replace_and_freeze():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    new = nn.Linear(2, 3)
    replace(model, "1.0", new)
    assert model[1][0] is new
    freeze(model, ["1"])
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]
    freeze(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_head_parameters():
    assert {n for n, _ in head_parameters(tiny("bert"))} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert {n.split(".")[0] for n, _ in head_parameters(tiny("distilbert"))} == {"pre_classifier", "classifier"}
    # A language model's output layer is pretrained, tied (gpt2) or not.
    assert list(head_parameters(tiny("llama"))) == list(head_parameters(tiny("gpt2"))) == []
    assert head_parameters(tiny("bert", architecture="BertModel")) == []


def test_load_model_routes_attention_and_is_fp32(tmp_path):
    tiny("bert").half().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "AutoModelForSequenceClassification", num_labels=3)
    assert model.config._attn_implementation == "compressft"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits(model.eval(), padded()).shape == (4, 3)


def test_resolve_names_what_is_missing(tmp_path):
    assert resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        resolve("./no-such-folder")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_recomputed_activations_leave_the_frozen_part_alone(family):
    """Layers are computed twice where something is trained in them, and no gradient reaches what is frozen below."""
    model = tiny(family)
    freeze(model)
    layers = anatomy(model).layers
    layers[-1].module.requires_grad_(True)
    checkpoint_activations(model)
    model.train()
    calls, wants = [0, 0], []
    for number, layer in enumerate(layers):
        part = layer.part(layer.linears[0])
        part.register_forward_hook(lambda m, a, y, n=number: calls.__setitem__(n, calls[n] + 1))
    model.get_submodule(layers[0].name).register_forward_hook(
        lambda m, a, y: wants.append((y if isinstance(y, torch.Tensor) else y[0]).requires_grad)
    )
    batch = batch_for(family)
    model(**batch).logits.square().mean().backward()
    assert calls == [1, 2] and not any(wants)


def test_a_causal_language_model_wants_a_decoder(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="sees later tokens"):
        load_model(str(tmp_path), "AutoModelForCausalLM")
