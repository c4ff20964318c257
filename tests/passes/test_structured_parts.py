"""Layers and hidden dimensions: what is masked is what ships, alone, together and next to everything else."""

import copy
import warnings

import pytest
import torch
from torch import nn

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy, stream
from compressft.model.count import count
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import load_delta, save_delta
from compressft.model.saved.state import plain_state
from compressft.model.shrink import shapes
from compressft.model.surgery import checkpoint_activations
from compressft.modules.gate import ColumnGate
from compressft.modules.part_gate import LayerGate, StreamMask
from compressft.objectives.distill import Distill
from compressft.passes.int8 import Int8
from compressft.passes.shared.parts import STATE, Parts
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.tiny import LABELS, TINY, VOCABULARY, batch_for, fit, labelled, logits, tiny

ROUNDING = {"align": 4, "floor_ffn": 4, "align_hidden": 4}
FAST = {**ROUNDING, "start": 0.0, "end": 0.5}
ALL = {"heads": 0.5, "ffn": 0.4, "layers": 0.5, "hidden": 0.4}
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2")


def architecture(family, head):
    stem = TINY[family][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    stem = stem.removesuffix("ForSequenceClassification")
    if head != "LM":
        return stem + head
    if family == "gpt2":
        return "GPT2LMHeadModel"
    return stem + ("ForCausalLM" if family in CAUSAL else "ForMaskedLM")


def data(family, head="ForSequenceClassification"):
    batch = batch_for(family)
    if head == "ForSequenceClassification":
        return {**batch, "labels": torch.arange(len(batch["input_ids"])) % LABELS}
    return {**batch, "labels": batch["input_ids"] % (LABELS if head == "ForTokenClassification" else VOCABULARY)}


def run(family, transforms, steps=4, head="ForSequenceClassification", checkpointing=False, **changes):
    """A tiny model trained with the transforms, in eval mode, and its batch."""
    model, batch = tiny(family, architecture=architecture(family, head), **changes), data(family, head)
    transforms = sorted(transforms, key=lambda t: t.order)
    context = Context(transforms=transforms)
    for transform in transforms:
        transform.prepare(model, context)
    if checkpointing:
        model.config.use_cache = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            checkpoint_activations(model)
    fit(model, transforms, [batch], steps, context=context)
    return model, batch


def settle(model, transforms):
    for transform in sorted(transforms, key=lambda t: t.order):
        transform.finalize(model)


def ships(model, batch, transforms, tolerance=1e-5):
    """Finalize a trained model; its logits must stay. Returns them."""
    want = logits(model, batch)
    settle(model, transforms)
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)
    return want


def nothing_left(model):
    kinds = (ColumnGate, LayerGate, StreamMask)
    assert not any(isinstance(m, kinds) or "Gated" in type(m).__name__ for m in model.modules())
    assert not any("structured" in name or "layer_gate" in name for name in model.state_dict())
    for module in model.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            assert not isinstance(getattr(hook, "__self__", None), kinds)


ONE_KIND = [(family, (kind,)) for family in ("bert", "electra", "llama", "gpt2") for kind in ("hidden", "layers")]


@pytest.mark.dear
@pytest.mark.parametrize(("family", "kinds"), [*[(family, tuple(ALL)) for family in TINY], *ONE_KIND])
def test_every_family_ships_its_masked_model(family, kinds, tmp_path):
    one = Structured(**{kind: ALL[kind] for kind in kinds}, **FAST)
    model, batch = run(family, [one])
    dense = logits(tiny(family, architecture=architecture(family, "ForSequenceClassification")), batch)
    status = one.status(model, 1.0)
    assert set(status) == set(kinds)
    ships(model, batch, [one])
    nothing_left(model)
    assert not torch.allclose(logits(model, batch), dense, atol=1e-2)
    if "hidden" in kinds:
        assert anatomy(model).width == 20 and status["hidden"]["now"] == 1 - 20 / 32
    if "layers" in kinds:
        assert len(shapes(model)) == model.config.num_hidden_layers == 1 and status["layers"]["now"] == 0.5
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    assert anatomy(loaded).width == anatomy(model).width and shapes(loaded) == shapes(model)


@pytest.mark.parametrize("head", ["ForTokenClassification", "LM"])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "llama", "gpt2"])
def test_every_head_is_narrowed(family, head):
    one = Structured(hidden=0.4, **FAST)
    model, batch = run(family, [one], head=head)
    ships(model, batch, [one])
    nothing_left(model)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is not None and model.config.tie_word_embeddings:
        assert output.weight is embedding.weight, "still tied"


def test_electra_whose_embeddings_are_the_stream():
    one = Structured(hidden=0.4, **FAST)
    model, batch = run("electra", [one], head="LM", embedding_size=32)
    assert not hasattr(model.electra, "embeddings_project")
    ships(model, batch, [one])
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 20)


@pytest.mark.parametrize("family", TINY)
def test_stream_lists_everything_that_has_its_width(family):
    """Width 36 occurs nowhere else; whatever has it must be known, and really be narrower afterwards."""
    changes = {"dim": 36, "n_heads": 4} if family == "distilbert" else {"hidden_size": 36}
    model = tiny(family, **changes)
    flow = stream(model)
    listed = {f"{path}.{leaf}" for path in (*flow.norms, *flow.writes) for leaf in ("weight", "bias")}
    listed |= {f"{path}.weight" for path in (*flow.reads, *flow.tables)}
    # Attention's own width is heads * head_dim = 36 in families without a head_dim of their own.
    own = {path for path in flow.reads if any(f".{p}." in f"{path}." for p in anatomy(model).layers[0].projections)}
    behind = {n for n, _ in model.named_parameters() if n.startswith(("classifier", "bert.pooler", "pre_classifier"))}
    for name, parameter in model.named_parameters():
        if 36 in parameter.shape and name not in behind and name.rpartition(".")[0] not in own:
            assert name in listed, name


def test_parameters_after_narrowing():
    """Counted by hand: BERT with a pooler that stays wide."""
    one = Structured(hidden=0.375, **FAST)
    model, _ = run("bert", [one])
    one.finalize(model)
    d, full, ffn = 20, 32, 64
    tables = (VOCABULARY + 40 + 2) * d + 2 * d
    layer = 3 * (full * d + full) + (d * full + d) + 2 * d + (ffn * d + ffn) + (d * ffn + d) + 2 * d
    assert count(model)["total"] == tables + 2 * layer + (full * d + full) + (LABELS * full + LABELS)


def test_what_dead_dimensions_hold_never_matters():
    one = Structured(hidden=0.4, **FAST)
    for family in ("bert", "electra", "llama", "gpt2"):
        model, batch = run(family, [one])
        want = logits(model, batch)
        dead = torch.nonzero(Parts.of(model, "structured").hidden.mask == 0).flatten()
        flow = stream(model)
        with torch.no_grad():
            for path in flow.tables:
                model.get_submodule(path).weight[:, dead] += 3.0
            for path in flow.writes:
                layer = model.get_submodule(path)
                (layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight)[dead] += 3.0
            for path in flow.norms:
                model.get_submodule(path).weight[dead] += 3.0
        assert torch.equal(logits(model, batch), want), family


BESIDE = {
    "int8": ([Int8()], {}),
    "int8, dynamic": ([Int8(ranges="dynamic")], {}),
    "houlsby": ([Adapter(placement="houlsby", size=5)], {}),
    "pfeiffer": ([Adapter(placement="pfeiffer", size=5)], {}),
    "pfeiffer, int8": ([Adapter(placement="pfeiffer", size=5), Int8()], {}),
    "own teacher": ([Distill(teacher="self", hidden=1.0)], {}),
    "recomputed": ([], {"checkpointing": True}),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("family", ["bert", "electra", "llama", "gpt2"])
def test_beside_others(family, beside):
    others, settings = BESIDE[beside]
    one = Structured(**ALL, **FAST)
    model, batch = run(family, [*others, one], **settings)
    assert Parts.of(model, "structured").hidden.importance.abs().min() > 0, "all dimensions are measured"
    ships(model, batch, [*others, one])
    nothing_left(model)


def test_int8_scales_do_not_see_dead_columns():
    """A huge weight in a dead column would coarsen its row's scale."""
    one, int8 = Structured(hidden=0.4, **FAST), Int8()
    model, batch = run("bert", [one, int8])
    want = logits(model, batch)
    dead = torch.nonzero(Parts.of(model, "structured").hidden.mask == 0).flatten()
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[:, dead] = 50.0
        model.bert.embeddings.word_embeddings.weight[:, dead] = 50.0
        model.bert.pooler.dense.weight[:, dead] = 50.0
    assert torch.equal(logits(model, batch), want)
    settle(model, [one, int8])
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


def test_distilling_hidden_states_of_a_wide_teacher():
    one, distill = Structured(**ALL, **FAST), Distill(teacher="wide", hidden=1.0)
    model, batch = tiny(), data("bert")
    context = Context(transforms=[distill, one], teachers={"wide": tiny(seed=5)})
    for transform in (distill, one):
        transform.prepare(model, context)
    fit(model, [distill, one], [batch], 4, context=context)
    ships(model, batch, [distill, one])


def test_delta_round_trip(tmp_path, monkeypatch):
    base = {k: v.clone() for k, v in plain_state(tiny())[0].items() if not k.startswith("classifier")}
    one = Structured(**ALL, **FAST)
    model, batch = run("bert", [one])
    one.finalize(model)
    tiny().save_pretrained(tmp_path / "base")
    save_delta(model, None, base, tmp_path / "delta", {"model": str(tmp_path / "base")})
    monkeypatch.setattr("compressft.model.saved.delta.base_tensors", lambda name, architecture: base)
    loaded = load_delta(tmp_path / "delta")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_plain_transformers_loads_a_narrow_model_that_states_its_head_size(family, tmp_path):
    import transformers

    one = Structured(hidden=0.4, **FAST)
    model, batch = run(family, [one])
    one.finalize(model)
    save_compressed(model, None, tmp_path / "model", {})
    name = architecture(family, "ForSequenceClassification")
    plain = getattr(transformers, name).from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    assert plain.config.hidden_size == 20
    torch.testing.assert_close(logits(plain.eval(), batch), logits(model, batch), atol=1e-5, rtol=1e-5)


def test_a_width_that_llama_would_refuse_is_loaded_by_us(tmp_path):
    """Four heads do not divide 18, which its configuration insists on."""
    one = Structured(hidden=0.45, **{**FAST, "align_hidden": 2})
    model, batch = run("llama", [one])
    one.finalize(model)
    assert anatomy(model).width == 18
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_a_narrow_model_can_be_pruned_again(tmp_path):
    one = Structured(hidden=0.375, **FAST)
    model, batch = run("bert", [one])
    one.finalize(model)
    again = Structured(hidden=0.4, layers=0.5, **FAST)
    again.prepare(model, Context())
    fit(model, [again], [batch], 4)
    ships(model, batch, [again])
    assert anatomy(model).width == 12 and len(shapes(model)) == 1


def test_layers_follow_the_schedule_and_may_return():
    model = tiny(num_hidden_layers=5)
    one = Structured(layers=0.6, start=0.0, end=0.6, schedule="linear", momentum=0.0)
    one.prepare(model, Context())
    gates = Parts.of(model, "structured").layers

    def push(progress, favourites):
        for index, gate in enumerate(gates):
            if gate.mask.requires_grad:
                gate.mask.grad = torch.full((1,), 1.0 if index in favourites else 0.1 / (1 + index))
        one.after_step(model, progress)
        return [i for i, gate in enumerate(gates) if gate.mask[0]]

    one.after_step(model, 0.0)
    # 5 * 0.6 * (0.1, 0.2, 0.4) / 0.6 = 0.5, 1 and 2 layers are to go; the least important ones first.
    assert len(push(0.09, {3, 4})) == 5
    assert push(0.2, {3, 4}) == [0, 1, 3, 4] and push(0.4, {3, 4}) == [0, 3, 4]
    assert push(0.4, {0, 1, 2}) == [0, 1, 2], "they came back"
    assert push(0.6, {3, 4}) == [3, 4]
    assert push(0.8, {0, 1}) == [3, 4], "the schedule has ended"
    one.finalize(model)
    assert [layer.attention.self.layer_idx for layer in model.bert.encoder.layer] == [0, 1]


def test_hidden_follows_the_schedule_and_may_return():
    model = tiny()
    one = Structured(hidden=0.5, start=0.0, end=0.6, schedule="linear", momentum=0.0, align_hidden=4)
    one.prepare(model, Context())
    gate = Parts.of(model, "structured").hidden
    low, high = torch.arange(16), torch.arange(16, 32)

    def push(progress, favourites):
        if gate.mask.requires_grad:
            gate.mask.grad = torch.full_like(gate.mask, 0.1)
            gate.mask.grad[favourites] = 1.0
        one.after_step(model, progress)
        return torch.nonzero(gate.mask).flatten().tolist()

    one.after_step(model, 0.0)
    assert push(0.3, low)[:16] == low.tolist() and len(push(0.3, low)) == 24
    assert set(push(0.3, high)) > set(high.tolist()), "they came back"
    assert push(0.6, low) == low.tolist() and push(0.9, high) == low.tolist()


def test_heads_and_neurons_are_counted_in_the_layers_that_stay():
    model, batch = tiny(num_hidden_layers=4), data("bert")
    one = Structured(layers=0.5, heads=0.5, ffn=0.5, **FAST)
    one.prepare(model, Context())
    fit(model, [one], [batch], 6)
    status = one.status(model, 1.0)
    ships(model, batch, [one])
    assert len(shapes(model)) == 2
    assert sum(x["heads"] for x in shapes(model)) == 4 and sum(x["ffn"] for x in shapes(model)) == 64
    assert all(s["now"] == s["target"] == 0.5 for s in status.values())


def test_dropped_layers_take_no_part_of_the_budget():
    """Every head of the dropped layers counts as much as the best ones of the others; still half of those stays."""
    model = tiny(num_hidden_layers=4)
    one = Structured(layers=0.5, heads=0.5, start=0.0, end=0.5, schedule="constant")
    one.prepare(model, Context())
    parts = Parts.of(model, "structured")
    for index in range(4):
        parts.layers[index].importance.fill_(1.0 if index in (1, 2) else 0.0)
        parts.heads[index].importance.copy_(torch.tensor([1.0, 0.1, 0.1, 0.1] if index in (1, 2) else [1.0] * 4))
    one.after_step(model, 0.4)
    assert parts.live_layers == [1, 2]
    assert sum(int(gate.mask.sum()) for gate in (parts.heads[1], parts.heads[2])) == 4
    assert one.status(model, 0.4)["heads"]["now"] == 0.5


def test_a_resumed_run_is_the_same():
    one = Structured(**ALL, **{**FAST, "end": 0.9})
    batch = data("bert")

    def fresh(seed):
        model = tiny(seed=seed)
        one.prepare(model, Context())
        return model

    def steps(model, first, last):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        one.after_step(model, first / 8)
        for step in range(first, last):
            model(**batch).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
            one.after_step(model, (step + 1) / 8)
            model.zero_grad()
        return model

    straight, first = steps(fresh(0), 0, 8), steps(fresh(0), 0, 3)
    resumed = fresh(1)
    resumed.load_state_dict(first.state_dict())
    steps(resumed, 3, 8)
    for (name, one_), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one_, other), name


def test_copies_are_independent():
    one = Structured(**ALL, **FAST)
    model, batch = run("bert", [one])
    want = logits(model, batch)
    other = copy.deepcopy(model)
    one.finalize(other)
    assert torch.equal(logits(model, batch), want) and hasattr(model.bert, STATE)
    torch.testing.assert_close(logits(other, batch), want, atol=1e-5, rtol=1e-5)


def test_the_optimiser_sees_no_gate():
    model = tiny()
    names = [name for name, _ in model.named_parameters()]
    Structured(**ALL, **FAST).prepare(model, Context())
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)


def test_a_model_with_an_unknown_reader_is_refused_before_training():
    model = tiny()
    model.bert.encoder.layer[0].attention.output.dropout = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(UserError, match=r"structured.hidden: BertForSequenceClassification cannot be made narrower"):
        Structured(hidden=0.4, align_hidden=4).prepare(model, Context())
    assert not hasattr(model.bert, STATE)


def test_too_coarse_an_alignment_is_refused():
    with pytest.raises(UserError, match=r"less than half of structured.align_hidden 32"):
        Structured(hidden=0.3).prepare(tiny(), Context())


def test_the_check_leaves_the_model_alone():
    model, batch = tiny(), labelled()
    want, state = logits(model, batch), copy.deepcopy(model.state_dict())
    Structured(hidden=0.5, align_hidden=4).prepare(model, Context())
    assert torch.allclose(logits(model, batch), want, atol=1e-5)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
