"""The nf4 pass: which weights it stores, that training acts on their values, and that these ship."""

import math

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.layers import Layers
from compressft.model.anatomy import anatomy
from compressft.modules.gate import MaskGate
from compressft.modules.linear import CompressedLinear
from compressft.modules.structure import describe
from compressft.objectives.distill import Distill
from compressft.passes.int8 import Int8
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny

METHOD = Adapter(placement="pfeiffer", size=4)


def stored(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear) and m.store is not None}


def prepared(*transforms, family="bert", **settings):
    model = tiny(family, **settings)
    for transform in sorted(transforms, key=lambda one: one.order):
        transform.prepare(model, Context())
    return model


def finalised(model, *transforms):
    for transform in sorted(transforms, key=lambda one: one.order):
        transform.finalize(model)
    return model


@pytest.mark.parametrize("family", TINY)
def test_every_family_trains_on_what_it_ships(family):
    method, one = Layers(top=0), Nf4()
    model, batch = prepared(method, one, family=family), batch_for(family)
    parts = anatomy(model)
    assert len(stored(model)) == len(parts.layers) * len(parts.layers[0].linears)
    assert parts.layers[0].ffn == 64
    before = logits(model, batch)
    weights = {name: layer.weight for name, layer in stored(model).items()}
    finalised(model, one)
    assert not stored(model) and all(torch.equal(model.get_submodule(n).weight, w) for n, w in weights.items())
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-5)
    plain = logits(tiny(family), batch)
    assert not torch.allclose(plain, before, atol=1e-3) and (plain - before).norm() < 0.7 * plain.norm()
    describe(model)


@pytest.mark.parametrize(("double", "limit"), [(True, 0.53), (False, 0.565)])
def test_weight_bytes_while_training(double, limit):
    """Counted over everything a layer holds; the layers are wide enough for the tables not to count."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = prepared(METHOD, Nf4(double=double), **wide)
    fit(model, [METHOD], [labelled()], steps=1)
    layers = stored(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    held = sum(t.nbytes for layer in layers for t in [*layer.parameters(recurse=False), *layer.buffers()])
    held -= sum(layer.bias.nbytes for layer in layers)
    assert weights == 4 * 256 * 256 + 2 * 256 * 512 and 0.5 < held / weights < limit
    fine = sum(t.nbytes for t in {id(p): p for p in tiny(**wide).bert.encoder.parameters()}.values())
    now = sum(t.nbytes for t in [*model.bert.encoder.parameters(), *model.bert.encoder.buffers()])
    assert now < 0.2 * fine


def test_excluded_parts():
    model = prepared(METHOD, Nf4(exclude=("up", "bert.encoder.layer.0.output.dense")))
    names = stored(model)
    assert len(names) == 12 - 2 - 1 and not any("intermediate" in name for name in names)
    with pytest.raises(UserError, match=r"nf4\.exclude: 'upp'"):
        prepared(METHOD, Nf4(exclude=("upp",)))


def test_trained_weights_are_refused():
    assert "method 'full' trains the weights" in conflict([Full(), Nf4()])
    assert conflict([METHOD, Nf4(), Int8()]) is None
    with pytest.raises(UserError, match="every projection is trained or excluded"):
        prepared(Layers(top=2), Nf4())
    # Layer 1 is trained, layer 0 is frozen.
    assert all(".layer.0." in path for path in stored(prepared(Layers(top=1), Nf4())))
    assert len(stored(prepared(Layers(top=1), Nf4()))) == 6


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
@pytest.mark.parametrize("int8", [False, True])
def test_beside_adapters_pruning_masks_and_int8(family, int8):
    """Finalising everything in its order keeps the function that was trained."""
    model = tiny(family, architecture="GPT2ForSequenceClassification" if family == "gpt2" else None)
    transforms = [
        METHOD,
        Distill(teacher="self", hidden=0.1),
        Nf4(),
        Structured(heads=0.5, ffn=0.5, align=4, floor_ffn=4, start=0.0, end=0.5),
        *([Int8(start=0.2)] if int8 else []),
    ]
    for transform in transforms:
        transform.prepare(model, Context())
    for name, layer in stored(model).items():
        gate = MaskGate(*layer.weight.shape)
        gate.keep(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(len(name))) > 0.3)
        layer.gates["magnitude"] = gate
    zeros = {name: ~layer.gates["magnitude"].mask for name, layer in stored(model).items()}
    packed = {name: layer.store.packed.clone() for name, layer in stored(model).items()}
    fit(model, transforms, [labelled(), labelled(seed=2)], steps=10)
    assert all(torch.equal(layer.store.packed, packed[name]) for name, layer in stored(model).items())
    want = logits(model, labelled())
    finalised(model, transforms[2])
    for name in zeros:
        layer = model.get_submodule(name)
        layer.fold("magnitude")
        assert (layer.weight[zeros[name]] == 0).all()
    finalised(model, *transforms[3:])
    torch.testing.assert_close(logits(model, labelled()), want, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_holds_the_bytes_and_resumes_bit_identically():
    def start():
        model = prepared(METHOD, Nf4())
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train(model, optimiser, steps):
        model.train()
        for step in steps:
            model(**labelled(seed=step)).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    torch.manual_seed(1)
    whole, optimiser = start()
    train(whole, optimiser, range(8))
    torch.manual_seed(1)
    model, optimiser = start()
    train(model, optimiser, range(5))
    state, random = model.state_dict(), torch.get_rng_state()
    assert sum(value.dtype == torch.uint8 for value in state.values()) == 2 * len(stored(model)) == 24
    assert not any(f"{name}.weight" in state for name in stored(model))
    resumed, other = start()
    # Whatever prepare stored, the checkpoint's bytes count.
    for layer in stored(resumed).values():
        layer.store.packed.zero_()
    resumed.load_state_dict(state)
    other.load_state_dict(optimiser.state_dict())
    torch.set_rng_state(random)
    train(resumed, other, range(5, 8))
    want = whole.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in resumed.state_dict().items())


def test_bf16_autocast():
    model = prepared(METHOD, Nf4())
    want = logits(model, batch_for("bert"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**labelled()).loss
        loss.backward()
        got = logits(model.eval(), batch_for("bert"))
    assert math.isfinite(float(loss.detach())) and (got - want).norm() < 0.1 * want.norm()


def test_in_a_stages_own_order_parts_are_removed_after_unpacking():
    """What removes columns cuts parameters, so the stored weights must be back by then."""
    prune = Structured(heads=0.5, ffn=0.5, align=4, floor_ffn=4, start=0.0, end=0.5)
    transforms = [prune, Int8(), Nf4(), METHOD]
    model = prepared(*transforms)
    assert len(stored(model)) == 12
    fit(model, sorted(transforms, key=lambda one: one.order), [labelled()], steps=6)
    want = logits(model, labelled())
    finalised(model, *transforms)
    assert not stored(model) and anatomy(model).layers[0].ffn < 64
    torch.testing.assert_close(logits(model, labelled()), want, atol=1e-4, rtol=1e-4)
