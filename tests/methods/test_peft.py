"""Tuner layers of the peft package in the delta slot: PEFT's own numbers, next to gates and quantizers, saved."""

import copy
import json
import warnings

import pytest
import torch

from compressft.errors import UserError
from compressft.export.fold import fold
from compressft.methods.peft import Peft
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.surgery import checkpoint_activations
from compressft.modules.linear import CompressedLinear, bare
from compressft.modules.tuner import PeftTuner, inject, peft_config
from compressft.passes.int8 import Int8
from compressft.passes.magnitude import Magnitude
from compressft.passes.nf4 import Nf4
from compressft.transform import Context, trainable
from tests.methods.added import check_packed
from tests.tiny import accuracy, fit, labelled, logits, tiny

CONFIGS = {
    "lora": {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1},
    "lora, all linears": {"peft_type": "LORA", "r": 3, "target_modules": "all-linear", "use_rslora": True},
    "lora, some linears": {
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["value"],
        "rank_pattern": {"0.attention.self.value": 2},
    },
    "lora with bias": {"peft_type": "LORA", "r": 4, "lora_bias": True},
    "dora": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "ia3": {"peft_type": "IA3"},
    "loha": {"peft_type": "LOHA", "r": 4},
    "lokr": {"peft_type": "LOKR", "r": 4},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "r": 0},
    "hra": {"peft_type": "HRA", "r": 4},
}
# As PEFT's own patterns for BERT, it takes in the pooler.
POOLER = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value", "dense"]}
FEW = ["lora", "dora", "ia3"]


def made(name, family="bert", seed=0):
    config = dict(CONFIGS[name])
    if family == "gpt2" and isinstance(config.get("target_modules"), list):
        config |= {"target_modules": ["c_attn"], "rank_pattern": {"0.attn.c_attn": 2}}
    architecture = {"gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification"}.get(family)
    model = tiny(family, architecture=architecture)
    method = Peft(config=config)
    method.prepare(model, Context(seed=seed))
    return model, method


def trained(name, family="bert", steps=3):
    model, method = made(name, family)
    fit(model, [method], [labelled(4)], steps, learning_rate=5e-2)
    return model, method


def tuners(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, PeftTuner)}


# Llama's projections have no bias; PEFT itself adapts a Conv1D with few of its types.
PAIRS = [("bert", name) for name in CONFIGS]
PAIRS += [("llama", name) for name in CONFIGS if name not in ("lora with bias", "lora, some linears")]
PAIRS += [("gpt2", name) for name in ("lora", "lora, some linears", "lora with bias", "dora", "ia3")]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_the_same_as_pefts_own_layers(family, name):
    """The trained tensors put into a model that PEFT itself has changed give the same logits."""
    model, _ = trained(name, family)
    found = tuners(model)
    assert found and any((m() != 0).any() for m in found.values())
    architecture = type(model).__name__
    other = tiny(family, architecture=architecture)
    config = peft_config(next(iter(found.values())).config)
    with warnings.catch_warnings():
        # That a Conv1D has its weight the other way round.
        warnings.simplefilter("ignore")
        theirs = inject(other, config, seed=9)
    assert set(theirs) == {m.path for m in found.values()}
    mine = dict(model.state_dict())
    state = {}
    for key in other.state_dict():
        ours = key.replace(".base_layer.", ".")
        if ours not in mine:
            owner = max((p for p in theirs if key.startswith(f"{p}.")), key=len)
            ours = key.replace(f"{owner}.", f"{owner}.delta.tuner.", 1)
        state[key] = mine[ours].t() if mine[ours].shape != other.state_dict()[key].shape else mine[ours]
    other.load_state_dict(state)
    batch = labelled(4, seed=3)
    torch.testing.assert_close(logits(model, batch), logits(other.eval(), batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_the_tuners_and_the_head_alone(name):
    model, method = made(name)
    names = {n for n, _ in trainable(model)}
    head = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert head < names and all(".delta.tuner." in n for n in names - head)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in names}
    assert any(n.endswith("query.weight") for n in frozen)
    fit(model, [method], [labelled()], 3)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "hra"])
def test_changes_nothing_at_the_start(name):
    batch = labelled(4)
    assert torch.equal(logits(made(name)[0], batch), logits(tiny(), batch))


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_changes_no_logit(name):
    model, _ = trained(name)
    batch = labelled(4, seed=5)
    want = logits(model, batch)
    merged = copy.deepcopy(model)
    for module in merged.modules():
        if isinstance(module, CompressedLinear):
            module.fold()
    assert not tuners(merged) and tuners(model)
    torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-5)
    deployed = fold(model)
    assert not any(isinstance(m, CompressedLinear | PeftTuner) for m in deployed.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded(name, tmp_path):
    model, _ = trained(name)
    batch = labelled(4, seed=5)
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch), logits(model, batch))
    json.loads((tmp_path / "model" / "compressft.json").read_text())


def test_delta_holds_the_declared_tensors(tmp_path):
    from safetensors.torch import load_file

    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model, _ = trained("lora")
    save_delta(model, None, base_tensors(str(tmp_path / "base")), tmp_path / "delta", {"model": str(tmp_path / "base")})
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    names = {n for n, _ in trainable(model)}
    assert set(stored) == names
    assert sum(t.numel() for n, t in stored.items() if "lora" in n) == 2 * 2 * 4 * (32 + 32)
    assert torch.equal(logits(load_delta(tmp_path / "delta"), labelled(4)), logits(model, labelled(4)))


@pytest.mark.parametrize("name", FEW)
def test_pruned_weights_stay_gone(name):
    """gate * (W + delta): what the tuner adds does not bring a weight back."""
    model, method = made(name)
    prune = Magnitude(sparsity=0.5, start=0.0, end=0.5)
    prune.prepare(model, Context())
    fit(model, [method, prune], [labelled(4)], 6, learning_rate=5e-2)
    batch = labelled(4, seed=5)
    before = logits(model, batch)
    prune.finalize(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-5)
    for layer in anatomy(model).layers:
        for path in layer.linears:
            weight = layer.part(path).weight
            assert not tuners(model) and 0.2 < float((weight == 0).float().mean()) < 0.8


@pytest.mark.parametrize("name", FEW)
def test_beside_a_quantizer_and_on_a_packed_base(name):
    model, method = made(name)
    quantise = Int8(ranges="dynamic")
    quantise.prepare(model, Context())
    fit(model, [method, quantise], [labelled(4)], 2)
    linear = anatomy(model).layers[0].part("attention.self.value")
    assert linear.delta is not None and linear.quantizer.ready

    packed, method, store = tiny(), Peft(config=CONFIGS[name]), Nf4()
    for one in sorted((method, store), key=lambda one: one.order):
        one.prepare(packed, Context())
    check_packed(packed)
    batch = labelled(4)
    plain = tiny()
    for own, layer in zip(anatomy(packed).layers, anatomy(plain).layers, strict=True):
        for path in layer.linears:
            layer.part(path).weight.data = own.part(path).weight.data
    # DoRA keeps the norms that the rows had before they were rounded.
    near = 0.05 if name == "dora" else 1e-5
    torch.testing.assert_close(logits(packed, batch), logits(plain, batch), atol=near, rtol=1e-5)
    fit(packed, [method, store], [batch], 2, learning_rate=5e-2)
    assert not torch.equal(logits(packed, batch), logits(plain, batch))


def test_bare_is_the_base():
    model, _ = trained("lora")
    with bare():
        inside = logits(model, labelled(4))
    base = tiny()
    base.load_state_dict({n: model.state_dict()[n] for n in base.state_dict()})
    assert torch.equal(inside, logits(base, labelled(4)))


@pytest.mark.parametrize("name", FEW)
def test_learns_and_recomputes(name):
    """16 examples are learned; with recomputed activations a step is the same."""
    model, method = made(name)
    batch = labelled()
    for _ in range(8):
        fit(model, [method], [batch], 40, learning_rate=1e-2)
        if accuracy(model, batch) == 1.0:
            break
    assert accuracy(model, batch) == 1.0

    def step(recompute):
        model, _ = made(name)
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if recompute:
            checkpoint_activations(model)
        model.train()
        model(**labelled(4)).loss.backward()
        return {n: p.grad for n, p in trainable(model)}

    ours, theirs = step(False), step(True)
    assert any(g.abs().max() > 0 for n, g in ours.items() if "delta" in n)
    for name, grad in ours.items():
        torch.testing.assert_close(theirs[name], grad)


def test_seeded_without_touching_the_global_generator():
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first, second = made("lora", seed=3)[0], made("lora", seed=3)[0]
    torch.manual_seed(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LORRA"}, "peft_type 'LORRA' is not known"),
        ({"peft_type": "LORA", "rank": 4}, "rank"),
        ({"peft_type": "LORA", "target_modules": ["nothing"]}, "nothing"),
        ({"peft_type": "LORA", "target_modules": ["word_embeddings"]}, "word_embeddings is no projection"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}, "use method prefix"),
        ({"peft_type": "ADALORA", "total_step": 4}, "use LORA"),
        ({"peft_type": "VERA"}, "VERA"),
        ({"peft_type": "LILY"}, "LILY with these fields is no change of a weight"),
        ({"peft_type": "POLY"}, "POLY with these fields is no change of a weight"),
        ({"peft_type": "LORA", "lora_bias": True, "family": "llama"}, "adds a bias to layers that have none"),
    ],
)
def test_refuses(config, message):
    model = tiny(config.pop("family", "bert"))
    with pytest.raises(UserError, match=message):
        Peft(config=config).prepare(model, Context())


def test_a_pooler_that_is_adapted_stays_frozen():
    model, method = tiny(), Peft(config=POOLER)
    method.prepare(model, Context())
    assert "bert.pooler.dense" in tuners_at(model)
    names = {n for n, _ in trainable(model) if "lora" not in n}
    assert names == {"classifier.weight", "classifier.bias"}
    before = model.bert.pooler.dense.weight.clone()
    fit(model, [method], [labelled(4)], 3, learning_rate=5e-2)
    assert torch.equal(model.bert.pooler.dense.weight, before) and tuners_at(model)["bert.pooler.dense"]().any()


def tuners_at(model):
    return {path.removesuffix(".delta"): tuner for path, tuner in tuners(model).items()}


def test_a_saved_configuration_trains_again():
    """PEFT writes inference_mode: true."""
    model = tiny()
    Peft(config={**CONFIGS["lora"], "inference_mode": True}).prepare(model, Context())
    assert any("lora_A" in name for name, _ in trainable(model))


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_output_layer_stays(tied):
    """PEFT trains the tuners alone there."""
    from peft import LoraConfig, get_peft_model

    model, other = (tiny("llama", tie_word_embeddings=tied) for _ in range(2))
    Peft(config={"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}).prepare(model, Context())
    with warnings.catch_warnings():
        # A name of transformers' that peft still uses.
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(other, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert all("lora" in name for name, _ in trainable(model))
    assert count(model)["trainable"] == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4},
        {"peft_type": "LORA", "modules_to_save": ["classifier"]},
        {"peft_type": "LORA", "init_lora_weights": "pissa"},
        {"peft_type": "LORA", "init_lora_weights": "olora"},
        {"peft_type": "LORA", "alora_invocation_tokens": [5, 6]},
        {"peft_type": "LORA", "target_parameters": ["weight"]},
    ],
)
def test_refused_at_load(config):
    with pytest.raises(ValueError, match=r"config\."):
        Peft(config=config)
