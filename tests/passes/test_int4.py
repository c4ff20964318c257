"""The int4 pass: layers, phases, error compensation, and what it ships next to pruning, masks and adapters."""

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.layers import Layers
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.gate import MaskGate
from compressft.modules.linear import CompressedLinear, dense
from compressft.modules.quantizer import Int4Quantizer
from compressft.objectives.distill import Distill
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.passes.nf4 import Nf4
from compressft.passes.shared.calibrate import second_moments
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context, TrainingData
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny


def quantised(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear) and m.quantizer is not None}


def context(rows=24, transforms=()):
    """Rows without a tokenizer: all of one length."""
    features = [{"input_ids": ids.tolist()} for ids in labelled(rows, 12, seed=3)["input_ids"]]

    def collate(batch):
        ids = torch.tensor([f["input_ids"] for f in batch])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(len(ids)).long()}

    return Context(transforms, seed=0, data=TrainingData(None, features, collate, lambda tokenizer: features))


def prepared(one, family="bert", method=None, **settings):
    model = tiny(family, **settings)
    for transform in (method or Full(), one):
        transform.prepare(model, context())
    return model


@pytest.mark.parametrize("family", TINY)
def test_every_family(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    one = Int4(symmetric=False)
    model = prepared(one, family)
    one.finalize(model)
    got = logits(model, batch)
    assert not torch.equal(got, want) and (got - want).norm() < 0.7 * want.norm()
    with dense():
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


def test_excluded_parts_and_tables():
    model = prepared(Int4(exclude=("q", "pooler", "bert.encoder.layer.1.output.dense"), embeddings="int4"))
    names = quantised(model)
    assert len(names) == 13 - 2 - 1 - 1 and not any("query" in name or "pooler" in name for name in names)
    tables = [m for m in model.modules() if isinstance(m, CompressedEmbedding)]
    assert len(tables) == 3 and sorted(t.bits for t in tables) == [4, 8, 8]
    assert not any(isinstance(m, CompressedEmbedding) for m in prepared(Int4(embeddings="none")).modules())
    with pytest.raises(UserError, match=r"int4\.exclude: 'pooller'"):
        prepared(Int4(exclude=("pooller",)))


def test_phases_and_noise_are_functions_of_progress():
    one = Int4(start=0.2, noise=0.6)
    model = prepared(one)
    for progress, active, rate in ((0.1, False, 0.0), (0.2, True, 0.0), (0.4, True, 0.5), (0.6, True, 1.0)):
        for other in (0.0, 1.0):
            one.after_step(model, other)
        one.after_step(model, progress)
        found = [m.quantizer for m in quantised(model).values()]
        assert all(q.active == active and q.rate == pytest.approx(rate) for q in found) and len(found) == 13
    assert one.status(model, 0.1)["bits"]["now"] == 32.0 and one.status(model, 0.3)["bits"]["now"] == 4.0
    one.after_step(model, 0.3)
    one.finalize(model)
    assert all(q.active and q.rate == 1.0 for q in found)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("level", [0, 4])
def test_joint_run_ships_what_it_trained(family, level):
    """Blocks are those of the columns that stay, while training as after they were removed."""
    model = tiny(family, architecture="GPT2ForSequenceClassification" if family == "gpt2" else None)
    transforms = [
        Distill(teacher="self", hidden=0.1),
        Structured(heads=0.5, ffn=0.4, align=4, floor_ffn=4, start=0.0, end=0.5),
        Int4(start=0.2, noise=0.7, accuracy_level=level, symmetric=False),
    ]
    for transform in transforms:
        transform.prepare(model, Context())
    fit(model, transforms, [labelled(), labelled(seed=2)], steps=10)
    want, total = logits(model, labelled()), sum(p.numel() for p in model.parameters())
    for transform in transforms:
        transform.finalize(model)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * total
    torch.testing.assert_close(logits(model, labelled()), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("one", [Int4(symmetric=False), Int4(), Int8(), Int8(weight_bits=7)])
def test_pruned_weights_stay_zero(one):
    model = prepared(one)
    for name, layer in quantised(model).items():
        gate = MaskGate(*layer.weight.shape)
        gate.keep(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(len(name))) > 0.5)
        layer.gates["magnitude"] = gate
    fit(model, [one], [labelled()], steps=2)
    for layer in quantised(model).values():
        eye = torch.eye(layer.in_features)
        with torch.no_grad():
            product = layer.quantizer.linear(eye, layer.effective_weight(), None, None).t()
        assert (product[~layer.gates["magnitude"].mask] == 0).all() and (product != 0).any()


def test_gptq_rounds_frozen_weights_once():
    one = Int4(rounding="gptq", rows=24)
    method = Adapter(placement="pfeiffer", size=4)
    model = prepared(one, method=method)
    layers = quantised(model)
    # The pooler is trained with the head: it is rounded to nearest as it goes.
    pooler = layers.pop("bert.pooler.dense").quantizer
    assert pooler.active and pooler.scale is None
    assert len(layers) == 12 and all(layer.quantizer.scale is not None for layer in layers.values())
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        assert torch.equal(layer.quantizer.rounded(layer.weight), layer.weight), name
    fit(model, [method, one], [labelled()], steps=3)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    want = logits(model, labelled())
    one.finalize(model)
    assert torch.equal(logits(model, labelled()), want)


def test_gptq_errs_less_than_nearest_in_every_layer():
    """Compared on what really flows into the layers of the rounded model."""
    one = Int4(rounding="gptq", rows=64)
    method = Layers(top=0)
    float_model, nearest = tiny(), Int4()
    model = tiny()
    wide = context(64)
    for transform in (method, one):
        transform.prepare(model, wide)
    batches = wide.calibration(64, "test")
    for batch in batches:
        batch.pop("labels")
    layers = quantised(model)
    del layers["bert.pooler.dense"]
    moments = second_moments(model, list(layers), batches)
    for name, layer in layers.items():
        weight = float_model.get_submodule(name).weight.detach()
        rtn = Int4Quantizer(nearest.block, nearest.symmetric).rounded(weight)
        errors = [float(((w - weight) @ moments[name] * (w - weight)).sum()) for w in (layer.weight.detach(), rtn)]
        assert errors[0] < 0.95 * errors[1], name


def test_gptq_is_the_same_on_resume():
    models = [prepared(Int4(rounding="gptq", rows=16), method=Layers(top=0)) for _ in range(2)]
    first, second = (m.state_dict() for m in models)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_gptq_refuses_trained_weights_and_missing_rows():
    with pytest.raises(UserError, match=r"layer\.1\.attention\.self\.query is trained; use 'nearest'"):
        prepared(Int4(rounding="gptq"), method=Layers(top=1))
    model = tiny()
    Layers(top=0).prepare(model, Context())
    with pytest.raises(UserError, match="gptq: needs training rows"):
        Int4(rounding="gptq").prepare(model, Context())


def test_conflicts():
    assert conflict([Full(), Structured(ffn=0.5), Int4()]) is None
    assert "keep one of the two" in conflict([Int4(), Int8()])
    assert "noise" in Int4(start=0.5, noise=0.3).check()
    gptq = Int4(rounding="gptq")
    assert conflict([Adapter(), gptq]) is None
    assert "trains the weights" in conflict([Full(), gptq])
    assert "removes input columns" in conflict([Structured(ffn=0.5), gptq])
    assert "stores the weights" in conflict([Nf4(), gptq])
    assert "leave int4.start" in Int4(rounding="gptq", start=0.1).check()


@pytest.mark.dear
@pytest.mark.parametrize("one", [Int4(noise=0.7), Int4(rounding="gptq", rows=16), Int8(ranges="learned", noise=0.7)])
def test_interrupted_training_ends_bit_identically(one):
    """State dict, optimiser and the global generator are what a checkpoint holds."""
    method = Full() if getattr(one, "rounding", None) != "gptq" else Adapter(placement="pfeiffer", size=4)
    batches = [labelled(seed=s) for s in range(3)]

    def start():
        model = tiny()
        for transform in (method, one):
            transform.prepare(model, context())
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train(model, optimiser, first, last):
        model.train()
        one.after_step(model, first / 40)
        for step in range(first, last):
            model(**batches[step % 3]).loss.backward()
            optimiser.step()
            one.after_step(model, (step + 1) / 40)
            optimiser.zero_grad()

    torch.manual_seed(1)
    whole, optimiser = start()
    train(whole, optimiser, 0, 30)
    torch.manual_seed(1)
    model, optimiser = start()
    train(model, optimiser, 0, 21)
    saved = model.state_dict(), optimiser.state_dict(), torch.get_rng_state()
    torch.manual_seed(99)
    resumed, other = start()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(resumed, other, 21, 30)
    want = whole.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.state_dict().items())
