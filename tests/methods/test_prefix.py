"""Prefix-tuning: what trains and ships, positions, words, generation, export, and parity with `peft`."""

import json

import onnxruntime
import pytest
import torch
import transformers
from safetensors import safe_open
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.onnx import operators, save, to_graph
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.prefix import PrefixTuning, sites
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.flops import flops
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.shrink import shrink
from compressft.model.surgery import checkpoint_activations
from compressft.modules.attention import Recorder, recording
from compressft.modules.linear import bare
from compressft.modules.prefix import Prefix, Table
from compressft.objectives.distill import Distill
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.passes.ziplm import ZipLM
from compressft.tasks import make_task
from compressft.transform import Context, TrainingData, trainable
from tests.methods.universal import check_resume
from tests.share import drawn
from tests.tiny import (
    PAIRS,
    SHAPE,
    TINY,
    accuracy,
    batch_for,
    fit,
    labelled,
    logits,
    padded,
    pair_batch,
    random_keep,
    tiny,
)

pytestmark = pytest.mark.dear

P = 3
MLP = PrefixTuning(length=P, hidden=8)
FLAT = PrefixTuning(length=P, reparameterise=False)
BOTH = pytest.mark.parametrize("method", [MLP, FLAT], ids=["mlp", "flat"])
CLASSIFIERS = {family: name.replace("ForCausalLM", "ForSequenceClassification") for family, (name, _) in TINY.items()}
CLASSIFIERS["gpt2"] = "GPT2ForSequenceClassification"


class Words:
    """A tokenizer with a table of words."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [5 + len(word) + ord(word[0]) % 40 for word in text.split()]}


def data(max_length=16, rows=((5, 6, 7),)):
    features = [{"input_ids": list(row), "attention_mask": [1] * len(row)} for row in rows]
    return TrainingData(Words(), features, None, lambda tokenizer: features, max_length)


def prepared(method=MLP, family="bert", context=None, **settings):
    model = tiny(family, **settings)
    method.prepare(model, context or Context())
    return model


def settled(method=MLP, family="bert", **settings):
    model = prepared(method, family, **settings)
    method.finalize(model)
    return model


def fronts(model):
    return [site.module.prefix for site in sites(model)]


def steps(family):
    """A batch on which a decoder of this family can be trained, with labels for what it predicts."""
    batch = batch_for(family)
    name = TINY[family][0]
    return {**batch, "labels": batch["input_ids"] if "Sequence" not in name else torch.tensor([0, 1, 2, 0])}


# What trains, what it starts as, what ships.


@BOTH
@pytest.mark.parametrize("family", TINY)
def test_settling_changes_no_logit(family, method):
    batch = batch_for(family)
    model = prepared(method, family)
    fit(model, [method], [steps(family)], 2)
    before = logits(model, batch)
    assert not torch.allclose(before, logits(tiny(family), batch), atol=1e-2)
    method.finalize(model)
    assert torch.equal(logits(model, batch), before)
    assert all(type(front) is Prefix and front.dropout == 0.0 for front in fronts(model))
    assert not any(isinstance(module, Table) for module in model.modules())


@BOTH
@pytest.mark.parametrize("family", TINY)
def test_size_of_what_ships(family, method):
    """2 * L * P * KV heads * head_dim."""
    _, kv_heads, head_dim, _ = SHAPE[family]
    model = settled(method, family)
    assert count(model)["total"] == count(tiny(family))["total"] + 2 * 2 * P * kv_heads * head_dim


def test_sizes_in_the_paper():
    """GPT-2 medium, 5 positions: 25,744,896 numbers while training, 245,760 kept (a fifth of the layers here)."""
    config = transformers.GPT2Config(n_embd=1024, n_head=16, n_layer=24, vocab_size=5, n_positions=8)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="compressft")
    names = {name for name, _ in model.named_parameters()}
    method = PrefixTuning(length=5)
    method.prepare(model, Context())
    assert sum(p.numel() for _, p in trainable(model)) == 25_744_896
    method.finalize(model)
    assert sum(p.numel() for n, p in model.named_parameters() if n not in names) == 245_760


HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
LAYERS = [f"bert.encoder.layer.{i}.attention.self.prefix" for i in (0, 1)]


def test_trainable_set_of_the_reparameterisation(check_training):
    expected = HEAD | {f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    check_training(tiny(), MLP, expected | {f"bert.prefix_tables.encoder.{p}" for p in ("table", "weight", "bias")})


def test_trainable_set_of_keys_and_values(check_training):
    check_training(tiny(), FLAT, HEAD | {f"{layer}.{part}" for layer in LAYERS for part in ("key", "value")})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_language_model_is_frozen_with_its_output_layer(family):
    model = prepared(FLAT, family)
    assert {name.rsplit(".", 2)[1] for name, _ in trainable(model)} == {"prefix"}
    assert {name for name, _ in trainable(prepared(FLAT, family, architecture=CLASSIFIERS[family]))} > {"score.weight"}


def test_every_tensor_has_one_name():
    """Checkpoints are written by safetensors, which refuses a tensor under two."""
    state = prepared(MLP, "llama").state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


@BOTH
def test_seed(method):
    first, again, other = (prepared(method, context=Context(seed=seed)) for seed in (1, 1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert ("prefix" in name) == (not torch.equal(tensor, other.state_dict()[name]))


def test_initialisation():
    """torch's own of an embedding and of linear layers; normal keys and values."""
    model = prepared(PrefixTuning(length=40, hidden=64))
    table, front = model.bert.prefix_tables["encoder"], fronts(model)[0]
    assert table.table.shape == (40, 32) and abs(float(table.table.detach().std()) - 1) < 0.1
    assert abs(float(front.weight.detach().std()) * (3 * 64) ** 0.5 - 1) < 0.1
    key = fronts(prepared(PrefixTuning(length=40, reparameterise=False)))[1].key.detach()
    assert abs(float(key.std()) - 1) < 0.1


@BOTH
def test_a_resumed_run_has_the_same_bits(method):
    check_resume(method, steps=5)


@BOTH
def test_learns_sixteen_examples(method):
    model, batch = prepared(method), labelled()
    for _ in range(8):
        fit(model, [method], [batch], steps=40, learning_rate=1e-2)
        if accuracy(model, batch) == 1.0:
            break
    assert accuracy(model, batch) == 1.0


@BOTH
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_base_teacher_sees_no_prefix(family, method):
    model, batch = prepared(method, family), batch_for(family)
    want = logits(tiny(family), batch)
    with bare():
        assert torch.equal(logits(model, batch), want)
    method.finalize(model)
    with bare():
        assert torch.equal(logits(model, batch), want)


def test_distilled_from_its_base():
    """Attention is compared over the row's own keys."""
    transforms = [MLP, Distill(teacher="base", logits=0.0, hidden=1.0, attention=1.0, relations=1.0)]
    model, context = tiny(), Context(transforms)
    for one in transforms:
        one.prepare(model, context)
    fit(model, transforms, [labelled()], 3, context=context)
    assert all(front.weight.grad is None for front in fronts(model))


def test_dropout_is_off_in_evaluation():
    method = PrefixTuning(length=P, hidden=8, dropout=0.5)
    model = prepared(method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    want = logits(prepared(), padded())
    assert torch.equal(logits(model, padded()), want)
    model.train()
    assert not torch.equal(logits(model, padded()), logits(model, padded()))


# Positions.


@pytest.mark.parametrize("family", TINY)
def test_positions_begin_behind_the_prefix_in_decoders_with_a_table(family):
    """As if the row stood at P: the same prefix, unshifted, with its places given."""
    if family != "gpt2":
        keep = [path for path, m in prepared(FLAT, family).named_modules() if getattr(m, "first", 0)]
        assert keep == []
        return
    batch = padded()
    unshifted = prepared(PrefixTuning(length=P, reparameterise=False, shift_positions=False), family)
    places = torch.arange(P, P + 9).expand(4, 9)
    want = logits(unshifted, {**batch, "position_ids": places})
    got = logits(prepared(FLAT, family), batch)
    assert torch.equal(got, want) and not torch.allclose(got, logits(unshifted, batch), atol=1e-3)


def test_an_encoder_can_be_shifted():
    method = PrefixTuning(length=P, reparameterise=False, shift_positions=True)
    model, batch = prepared(method), padded()
    want = logits(prepared(FLAT), {**batch, "position_ids": torch.arange(P, P + 9).expand(4, 9)})
    assert torch.equal(logits(model, batch), want)


def test_a_prefix_beyond_the_table_is_refused():
    message = (
        r"method prefix\.length: 30 and rows of 16 tokens are more than the model's 40 positions; "
        r"lower length or data\.max_length, or set shift_positions to false"
    )
    method = PrefixTuning(length=30, reparameterise=False)
    model = tiny("gpt2")
    with pytest.raises(UserError, match=message):
        method.prepare(model, Context(data=data(16)))
    assert all(p.requires_grad for p in model.parameters())
    prepared(method, "gpt2", Context(data=data(10)))
    with pytest.raises(UserError, match="rows of 11 tokens"):
        prepared(method, "gpt2", Context(data=data(None, rows=[range(5, 16), (5, 6)])))
    # RoBERTa's table begins behind its padding id.
    for length, fits in ((28, True), (29, False)):
        shifted = PrefixTuning(length=length, reparameterise=False, shift_positions=True)
        if fits:
            model = prepared(shifted, "roberta", Context(data=data(10)))
            logits(model, {"input_ids": torch.full((1, 10), 5), "attention_mask": torch.ones(1, 10).long()})
        else:
            with pytest.raises(UserError, match="the model's 38 positions"):
                prepared(shifted, "roberta", Context(data=data(10)))


def test_refusals():
    with pytest.raises(UserError, match=r"method prefix\.shift_positions: llama has no table of positions"):
        prepared(PrefixTuning(shift_positions=True), "llama")
    with pytest.raises(UserError, match="attention is 'sdpa', which knows no prefix; load it with"):
        MLP.prepare(tiny(attention="sdpa"), Context())
    with pytest.raises(UserError, match="has a prefix already; start from a model without one"):
        MLP.prepare(settled(FLAT), Context())
    with pytest.raises(UserError, match="words need the stage's tokenizer"):
        prepared(PrefixTuning(initial="sunny words"))
    with pytest.raises(UserError, match=r"method prefix\.initial: ' ' has no tokens"):
        prepared(PrefixTuning(initial=" "), context=Context(data=data()))
    with pytest.raises(UserError, match="words are for a single stack"):
        prepared(PrefixTuning(initial="sunny"), "t5", Context(data=data()))


# Real words.


def test_a_model_without_values_is_only_counted():
    model = tiny().to("meta")
    PrefixTuning(length=P, hidden=8, initial="words").prepare(model, Context())
    assert sum(p.numel() for _, p in trainable(model)) == sum(p.numel() for _, p in trainable(prepared()))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("initial", ["one three fives", ("one", "three fives and", "more")])
def test_words_act_as_if_they_stood_in_front(family, initial):
    """Keys and values of real words, at the places before the row's own, are those words as a prompt."""
    method = PrefixTuning(length=P, reparameterise=False, initial=initial)
    batch = {name: value[:1] for name, value in padded().items()}
    model = prepared(method, family, Context(data=data()))
    words = Words()("one three fives")["input_ids"]
    ids = torch.cat([torch.tensor([words]), batch["input_ids"]], 1)
    want = logits(tiny(family), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[P:]
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_words_are_repeated_until_there_are_enough(family):
    method = PrefixTuning(length=5, reparameterise=False, initial="one three")
    model = prepared(method, family, Context(data=data()))
    other = PrefixTuning(length=5, reparameterise=False, initial="one three one three one three")
    for front, twin in zip(fronts(model), fronts(prepared(other, family, Context(data=data()))), strict=True):
        assert torch.equal(front.key, twin.key) and torch.equal(front.value, twin.value)
    assert not torch.allclose(front.key[:, 0], front.key[:, 2])


def test_the_reparameterisation_is_fitted_to_words():
    def distance(steps):
        method = PrefixTuning(length=P, hidden=64, initial="one three fives", fit_steps=steps)
        model = prepared(method, "llama", Context(data=data()))
        assert all(p.grad is None for p in model.parameters())
        found = [t.detach() for front in fronts(model) for t in front()]
        return sum(float(F.mse_loss(t, w)) for t, w in zip(found, wanted, strict=True))

    flat = PrefixTuning(length=P, reparameterise=False, initial="one three fives")
    wanted = [t.detach() for f in fronts(prepared(flat, "llama", Context(data=data()))) for t in f()]
    assert distance(300) < 0.5 * distance(0)


# Generation.


def cached(model, batch, family, first=4):
    """Logits of a forward over the first tokens and then one at a time, through the cache."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found = None, []
    for end in range(first, ids.shape[1] + 1):
        start = 0 if cache is None else end - 1
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=places[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(found, 1), model(input_ids=ids, attention_mask=mask, position_ids=places).logits


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_cached_generation_equals_the_full_forward(family, left, method):
    model = prepared(method, family)
    batch = padded(left=True) if left else {name: value[:1] for name, value in padded().items()}
    got, want = cached(model, batch, family)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation_with_left_padding(family, cache):
    model, batch = settled(MLP, family), padded(left=True)
    out = model.generate(
        **batch, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, cache_implementation=cache
    )
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 5, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(input_ids=out, attention_mask=mask, position_ids=places).logits
    assert torch.equal(full[:, -6:-1].argmax(-1), out[:, -5:])
    alone = model.generate(input_ids=batch["input_ids"][:1], max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(alone[0], out[0])


@torch.no_grad()
def test_beams():
    model, batch = settled(MLP, "llama"), padded(left=True)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    out = model.generate(**batch, num_beams=3, num_return_sequences=3, **settings)
    assert out.shape == (12, 13)
    greedy = model.generate(**batch, **settings)

    def likelihood(rows):
        scores = model(input_ids=rows).logits[:, -5:-1].log_softmax(-1)
        return scores.gather(-1, rows[:, -4:, None]).sum()

    assert likelihood(out[:1]) >= likelihood(greedy[:1]) - 1e-5


# Next to the ways to train.


@BOTH
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family, method):
    def gradients(checkpointed):
        model = prepared(method, family)
        if checkpointed:
            checkpoint_activations(model)
        model.train()
        torch.manual_seed(0)
        model(**steps(family), use_cache=False).loss.backward() if family != "bert" else model(
            **steps(family)
        ).loss.backward()
        return {name: p.grad for name, p in trainable(model)}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and all(grad is not None and grad.abs().sum() > 0 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, atol=1e-6, rtol=1e-5)


def test_compiled():
    torch._dynamo.reset()
    model, batch = prepared(MLP, "llama"), padded()
    want = logits(model, batch)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), batch), want, atol=1e-6, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bf16_autocast(family, method):
    model, batch = prepared(method, family), steps(family)
    want = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, batch)
        model(**batch).loss.backward()
    assert (got.float() - want).norm() < 0.05 * want.norm()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in trainable(model))


def test_on_a_four_bit_base():
    transforms = [MLP, Nf4()]
    model = tiny()
    for one in transforms:
        one.prepare(model, Context(transforms))
    fit(model, transforms, [labelled()], 2)
    before = logits(model, padded())
    plain = {name for name, _ in tiny().named_parameters()}
    stored = sum(1 for name in plain if name not in dict(model.named_parameters()))
    assert stored == 12
    for one in transforms:
        one.finalize(model)
    torch.testing.assert_close(logits(model, padded()), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "labels"),
    [
        ("BertForTokenClassification", {}, torch.arange(36).view(4, 9) % 3),
        ("BertForSequenceClassification", {"num_labels": 1}, torch.tensor([0.1, -0.4, 1.0, 2.0])),
    ],
)
def test_other_heads(architecture, changes, labels):
    model = prepared(architecture=architecture, **changes)
    batch = {**padded(), "labels": labels}
    before = float(model(**batch).loss.detach())
    fit(model, [MLP], [batch], 30)
    assert float(model(**batch).loss.detach()) < 0.8 * before
    want = logits(model, batch)
    MLP.finalize(model)
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_padding_and_batch_mates_change_nothing(family):
    model, batch = prepared(family=family, architecture=CLASSIFIERS[family]), batch_for(family)
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        torch.testing.assert_close(logits(model, alone), logits(model, batch)[row : row + 1], atol=1e-5, rtol=1e-5)


# Next to compression.


@pytest.mark.parametrize("family", TINY)
def test_a_kv_head_goes_with_its_prefix(family):
    """Removing groups is the same as never adding what they give."""
    model, batch = settled(FLAT, family), batch_for(family)
    keep = random_keep(model)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer, kept in zip(anatomy(model).layers, keep, strict=True):
        o, size = layer.part(layer.family.o), layer.head_dim * layer.heads // layer.kv_heads
        dead = [g for g in range(layer.kv_heads) if g not in kept["heads"].tolist()]
        columns = torch.cat([torch.arange(g * size, (g + 1) * size) for g in dead] or [torch.tensor([]).long()])
        weight = o.weight.data if type(o).__name__ != "Conv1D" else o.weight.data.t()
        weight[:, columns] = 0.0
    want = logits(model, batch)
    shrink(model, [{"heads": kept["heads"]} for kept in keep])
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    for front, kept, (name, tensor) in zip(
        fronts(model), keep, [item for item in full.items() if item[0].endswith("prefix.key")], strict=True
    ):
        assert torch.equal(front.key, tensor[kept["heads"]]), name


PASSES = {
    "structured": [Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, end=0.5)],
    "hidden": [Structured(heads=0.5, hidden=0.5, align_hidden=8, end=0.5)],
    "layers": [Structured(layers=0.5, end=0.5)],
    "int8": [Structured(heads=0.5, end=0.5), Int8()],
    "int4": [Int4(embeddings="int4")],
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_passes_settle_and_survive_saving(family, name, tmp_path):
    transforms = [MLP, *PASSES[name]]
    model, batch = tiny(family, architecture=CLASSIFIERS[family]), labelled()
    for one in transforms:
        one.prepare(model, Context(transforms))
    fit(model, transforms, [batch], 6)
    before = logits(model, batch)
    for one in transforms:
        one.finalize(model)
    after = logits(model, batch)
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch), after)
    if name in ("structured", "int8"):
        assert sum(front.key.shape[0] for front in fronts(model)) == 4


def test_a_prefix_of_an_earlier_stage_is_pruned(tmp_path):
    """ZipLM removes heads before its stage trains; the settled prefix goes with them and trains on."""
    model = settled(MLP)
    features = [{"input_ids": [5 + i, 6, 7 + i], "attention_mask": [1, 1, 1]} for i in range(16)]
    task = make_task("sequence-classification", Words(), 16, ["a", "b", "c"])
    rows = TrainingData(Words(), features, task.collate, lambda tokenizer: features)
    Full().prepare(model, Context())
    ZipLM(target={"sparsity": 0.5}, align=8, floor_ffn=8).prepare(model, Context(data=rows))
    assert [f.key.shape[0] for f in fronts(model)] == [x.kv_heads for x in anatomy(model).layers] != [4, 4]
    fit(model, [Full()], [labelled()], 2)
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), padded()), logits(model, padded()))


def test_an_adapter_on_top_of_a_prefix():
    model = settled(MLP)
    Adapter(size=4).prepare(model, Context())
    assert not any("prefix" in name for name, _ in trainable(model))
    logits(model, padded())


def test_operations_are_counted():
    """Two products of 2 * heads * head_dim * T * P operations in each of two layers."""
    assert flops(settled(), 9) - flops(tiny(), 9) == 2 * (2 * 2 * 32 * 9 * P)


def test_what_attention_was_given_is_recorded_without_it():
    model, plain = prepared(), tiny()
    taken = []
    for one in (model, plain):
        recorder = Recorder({site.module: n for n, site in enumerate(sites(one))})
        with recording(recorder), torch.no_grad():
            one(**padded())
        taken.append(recorder.taken)
    assert taken[0][1].key.shape == taken[1][1].key.shape == (4, 4, 9, 8)
    assert torch.equal(taken[0][0].key, taken[1][0].key) and torch.equal(taken[0][0].mask, taken[1][0].mask)


# Files.


@BOTH
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "gpt2"])
def test_saved_and_loaded_to_the_bit(family, method, tmp_path):
    model = prepared(method, family)
    fit(model, [method], [steps(family)], 2)
    method.finalize(model)
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(logits(loaded, batch_for(family)), logits(model, batch_for(family)))
    with safe_open(tmp_path / "model" / "compressft.safetensors", "pt") as file:
        assert {name.rsplit(".", 1)[1] for name in file.keys()} == {"key", "value"}  # noqa: SIM118
    # Once more: what was loaded can be saved.
    save_compressed(loaded, None, tmp_path / "again", {})
    assert torch.equal(logits(load_compressed(tmp_path / "again"), batch_for(family)), logits(model, batch_for(family)))


@BOTH
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_delta_holds_keys_values_and_head(family, method, tmp_path):
    tiny(family).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    model = load_model(base, f"AutoModelFor{'SequenceClassification' if family == 'bert' else 'CausalLM'}")
    method.prepare(model, Context())
    fit(model, [method], [steps(family)], 2)
    method.finalize(model)
    save_delta(model, None, base_tensors(base), tmp_path / "delta", {"model": base})
    with safe_open(tmp_path / "delta" / "delta.safetensors", "pt") as file:
        names = {name.split("#")[0] for name in file.keys()}  # noqa: SIM118
        numbers = sum(file.get_tensor(n).numel() for n in file.keys() if ".prefix." in n)  # noqa: SIM118
    attention = "bert.encoder.layer.{}.attention.self" if family == "bert" else "transformer.h.{}.attn"
    kept = {f"{attention.format(i)}.prefix.{part}" for i in (0, 1) for part in ("key", "value")}
    assert names == kept | (HEAD if family == "bert" else set())
    assert numbers == 2 * 2 * P * 32
    assert torch.equal(logits(load_delta(tmp_path / "delta"), batch_for(family)), logits(model, batch_for(family)))


def test_an_unsettled_prefix_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="prefix: is still reparameterised; call the transforms' finalize"):
        save_compressed(prepared(), None, tmp_path / "model", {})


def test_folders_say_what_is_in_them(tmp_path):
    save_compressed(settled(FLAT, "gpt2"), None, tmp_path / "model", {})
    modules = json.loads((tmp_path / "model" / "compressft.json").read_text())["modules"]
    assert modules["transformer.h.1.attn.prefix"] == {"kind": "prefix", "heads": 4, "length": P, "size": 8}
    assert modules["transformer.wpe"] == {"kind": "embedding", "bits": None, "block": 32, "first": P}


# Export.


def written(model, folder, fuse=False, batch=None):
    graph = to_graph(fold(model), batch or padded(2, 5))
    fused = fuse_qattention(graph) if fuse else 0
    save(graph, folder / "model.onnx")
    return graph, fused, onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])


def run(session, batch):
    names = {value.name for value in session.get_inputs()}
    out = torch.from_numpy(session.run(["logits"], {n: v.numpy() for n, v in batch.items() if n in names})[0])
    return out[batch["attention_mask"].bool()] if out.dim() == 3 else out


@pytest.mark.parametrize("family", drawn(1, ["bert", "qwen2", "gpt2"]))
def test_exported_file_equals_the_model(family, tmp_path):
    model, batch = settled(MLP, family), batch_for(family)
    graph, _, session = written(model, tmp_path, batch=batch)
    assert operators(graph)["MultiHeadAttention"] == 2
    for other in (batch, {n: v[:1, :6] for n, v in batch.items()}, {n: v[1:, 1:7] for n, v in batch.items()}):
        torch.testing.assert_close(run(session, other), logits(model, other), atol=1e-5, rtol=1e-4)
    if family == "gpt2":
        # Rows that nothing looks up any more are not in the file.
        shapes = [tuple(v.const_value.shape) for v in graph.graph.initializers.values()]
        assert (40 - P, 32) in shapes and (40, 32) not in shapes


def quantised(model, eight):
    """Ranges learned from one batch, everything settled."""
    eight.prepare(model, Context())
    with torch.no_grad():
        model.train()(**labelled())
    model.eval()
    MLP.finalize(model)
    eight.finalize(model)
    return model, {name: value for name, value in labelled().items() if name != "labels"}


@pytest.mark.full
def test_standard_operators_alone(tmp_path):
    """Attention is written out there, the prefix with it."""
    model = prepared(MLP, "gpt2", architecture=CLASSIFIERS["gpt2"])
    model, batch = quantised(model, Int8(format="qdq"))
    graph, _, session = written(model, tmp_path)
    assert {node.domain for node in graph.graph} == {""}
    want = logits(model, batch)
    assert (run(session, batch) - want).abs().max() < 0.05 * want.std()


@pytest.mark.full
def test_layers_with_a_prefix_keep_the_general_node(tmp_path):
    """QAttention has no place for it."""
    model = prepared(MLP, num_hidden_layers=3)
    model.bert.encoder.layer[0].attention.self.prefix = None
    model, batch = quantised(model, Int8())
    graph, fused, session = written(model, tmp_path, fuse=True)
    found = operators(graph)
    # The last layer's one query keeps it anyway.
    assert fused == found["QAttention"] == 1 and found["MultiHeadAttention"] == 2
    want = logits(model, batch)
    assert (run(session, batch) - want).abs().max() < 0.05 * want.std()


# Encoder-decoders.


@BOTH
@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoders_have_three(family, method, tmp_path):
    model, batch = prepared(method, family), pair_batch()
    places = list(sites(model))
    assert [site.kind for site in places] == ["encoder"] * 2 + ["decoder", "cross"] * 2
    if method is MLP:
        assert sorted(anatomy(model).backbone.prefix_tables) == ["cross", "decoder", "encoder"]
    model(**batch).loss.backward()
    for name, parameter in trainable(model):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        before = model(**batch).logits
        method.finalize(model)
        assert torch.equal(model(**batch).logits, before)
        for kind in ("encoder", "decoder", "cross"):
            for site in places:
                if site.kind == kind:
                    held, site.module.prefix = site.module.prefix, None
            assert not torch.allclose(model(**batch).logits, before, atol=1e-4), kind
            for site, front in zip(places, [held] * len(places), strict=True):
                site.module.prefix = site.module.prefix or front


@torch.no_grad()
@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoders_generate_through_their_caches(family):
    model, batch = settled(MLP, family), padded()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "forced_eos_token_id": None}
    out = model.generate(**batch, **settings)
    full = model(**batch, decoder_input_ids=out).logits
    assert torch.equal(full[:, :-1].argmax(-1), out[:, 1:])


# Parity.


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("projection", [True, False])
def test_equals_peft(projection):
    """GPT-2 with the same tensors, rows padded on the right."""
    import peft

    model = prepared(PrefixTuning(length=P, hidden=8, reparameterise=projection), "gpt2")
    base = tiny("gpt2", attention="eager")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=8
    )
    other = peft.get_peft_model(base, config).eval()
    encoder = other.prompt_encoder["default"]
    if projection:
        table = model.transformer.prefix_tables["decoder"]
        encoder.embedding.weight.copy_(table.table)
        encoder.transform[0].weight.copy_(table.weight)
        encoder.transform[0].bias.copy_(table.bias)
        for name in ("weight", "bias"):
            getattr(encoder.transform[2], name).copy_(torch.cat([getattr(front, name) for front in fronts(model)]))
    else:
        # (P, 2L, H, D), each layer's keys before its values.
        rows = torch.stack([part for front in fronts(model) for part in front()]).permute(2, 0, 1, 3)
        encoder.embedding.weight.copy_(rows.reshape(P, -1))
    batch = padded()
    got, want = logits(model, batch), logits(other, batch)
    assert (got - want).abs().max() <= 1e-5
    assert (want - logits(base, batch)).abs().max() > 1e-2
