"""Probes: head only, one encoder pass per example, cached features equal to computed ones, no dropout; their heads."""

import pytest
import torch
from pydantic import ValidationError

from compressft.errors import UserError
from compressft.methods.probe import Probe
from compressft.methods.scalar_mix import mix_of
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.linear import bare
from compressft.passes.int8 import Int8
from compressft.passes.shared.parts import Parts
from compressft.passes.shared.quantised import quantizers
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context, TrainingData, trainable
from tests.methods.added import (
    CASES,
    FAMILIES,
    check_checkpointing,
    check_frozen_base,
    check_nf4,
    check_round_trips,
    headed,
    names_of,
    rows_for,
    shaken,
    trained,
)
from tests.tiny import TINY, accuracy, batch_for, fit, labelled, logits, padded, tiny

CLASSIFIERS = {family: name.replace("ForCausalLM", "ForSequenceClassification") for family, (name, _) in TINY.items()}
CLASSIFIERS["gpt2"] = "GPT2ForSequenceClassification"


def prepared(cache=True, family="bert"):
    model = tiny(family, architecture=CLASSIFIERS[family])
    Probe(cache=cache).prepare(model, Context())
    return model


def test_trainable_set(check_training):
    names = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    check_training(tiny(), Probe(), names)


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_cached_equals_uncached_equals_plain(family):
    cached, uncached, plain = (
        prepared(True, family),
        prepared(False, family),
        tiny(family, architecture=CLASSIFIERS[family]),
    )
    batch = batch_for(family)
    want = logits(plain, batch)
    for _ in range(2):
        torch.testing.assert_close(logits(cached, batch), want, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(logits(uncached, batch), want, atol=1e-6, rtol=1e-5)


def test_other_batches_and_paddings_hit_the_cache():
    model, batch = prepared(), padded()
    want = logits(model, batch)
    runs = encoder_rows(model)
    order = torch.tensor([2, 0, 3, 1])
    wide = {name: torch.nn.functional.pad(value, (0, 4))[order] for name, value in batch.items()}
    torch.testing.assert_close(logits(model, wide), want[order], atol=1e-6, rtol=1e-5)
    assert runs == []


def encoder_rows(model):
    runs = []
    anatomy(model).layers[0].module.register_forward_pre_hook(lambda m, args: runs.append(len(args[0])))
    return runs


def test_every_example_is_encoded_once():
    model = prepared()
    runs = encoder_rows(model)
    batches = [labelled(6, seed=1), labelled(6, seed=2)]
    mixed = {name: torch.cat([value[:3] for value in (batches[0][name], batches[1][name])]) for name in batches[0]}
    fit(model, [Probe()], [*batches, mixed], steps=9)
    assert sum(runs) == 12
    uncached = prepared(cache=False)
    runs = encoder_rows(uncached)
    fit(uncached, [Probe(cache=False)], [*batches, mixed], steps=9)
    assert sum(runs) == 9 * 6


def test_segments_are_part_of_the_key():
    model, batch = prepared(), padded()
    segments = torch.zeros_like(batch["input_ids"])
    segments[:, 3:] = 1
    first = logits(model, {**batch, "token_type_ids": torch.zeros_like(segments)})
    second = logits(model, {**batch, "token_type_ids": segments})
    torch.testing.assert_close(second, logits(tiny(), {**batch, "token_type_ids": segments}), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("cache", [True, False])
def test_the_encoder_has_no_dropout_and_no_graph(cache):
    model = prepared(cache).train()
    batch = padded()
    states = [model.bert(**batch).last_hidden_state for _ in range(2)]
    assert not states[0].requires_grad
    mask = batch["attention_mask"].bool()
    want = tiny().bert(**batch).last_hidden_state
    for state in states:
        torch.testing.assert_close(state[mask], want[mask], atol=1e-6, rtol=1e-5)
    assert model.bert.training and model.bert.encoder.training
    # The head's own dropout stays.
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_finalize_gives_the_model_back():
    model, plain = prepared(), tiny()
    Probe().finalize(model)
    assert "forward" not in vars(model.bert)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(model, padded()), logits(plain, padded()))


def test_caching_conflicts_with_passes():
    for other in (Structured(ffn=0.5), Int8()):
        assert "set method.cache to false" in conflict([Probe(), other])
        assert conflict([Probe(cache=False), other]) is None
    assert conflict([Probe()]) is None


# Heads in front of the model's own, and features.

KINDS = {
    "mlp": Probe(head="mlp", size=24),
    "bilstm": Probe(head="bilstm", size=8),
    "mean": Probe(pooling="mean"),
    "mean, bilstm": Probe(pooling="mean", head="bilstm", size=8),
    "mix": Probe(features="scalar_mix"),
    "mix, bilstm": Probe(head="bilstm", features="scalar_mix"),
}


def context_of(batch):
    """A stage's context whose training rows are this batch's."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        rows.append({"input_ids": ids[mask.bool()].tolist(), "attention_mask": [1] * int(mask.sum())})

    def collate(features):
        width = max(len(f["input_ids"]) for f in features)
        return {k: torch.tensor([f[k] + [0] * (width - len(f[k])) for f in features]) for k in features[0]}

    return Context(data=TrainingData(None, rows, collate, lambda tokenizer: rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_cached_and_not(kind, family):
    """While it trains, with and without a cache, and when it is finished, the same function."""
    results = []
    for cache in (True, False) if KINDS[kind].features == "last" else (False,):
        method = KINDS[kind].model_copy(update={"cache": cache})
        model = headed(family)
        method.prepare(model, Context(seed=4))
        shaken(model, "probe_head.", "scalar_mix.")
        results += [logits(model, batch_for(family)) for _ in range(2)]
        method.finalize(model)
        results.append(logits(model, batch_for(family)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results[0], logits(headed(family), batch_for(family)), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mlp", "bilstm"])
def test_where_the_head_stands(kind):
    model, plain = headed("distilbert", "token"), headed("distilbert", "token")
    KINDS[kind].prepare(model, Context())
    KINDS[kind].finalize(model)
    batch = padded()
    states = model.distilbert.probe_head(plain.distilbert(**batch).last_hidden_state, batch["attention_mask"])
    want = plain.classifier(states)[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [True, False])
def test_the_models_own_head_reads_the_mean(mask, family, tmp_path):
    """Of the tokens alone: paddings on either side change nothing."""
    model, plain = headed(family), headed(family)
    Probe(pooling="mean").prepare(model, Context())
    Probe(pooling="mean").finalize(model)
    batch = padded(3, 8, left=family == "gpt2") if mask else {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    mean = torch.stack([s[r].mean(0) for s, r in zip(plain.base_model(**batch).last_hidden_state, real, strict=True)])
    got = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(got, mean[:, None].expand_as(got), atol=1e-5, rtol=1e-5)
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch), logits(model, batch))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_standardised_means(family):
    batch = padded(12, 9)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = headed(family).base_model(**batch).last_hidden_state
    means = torch.stack([s[r].mean(0) for s, r in zip(states, real, strict=True)])
    for fields, rows in (({}, means), ({"head": "mlp"}, means), ({"head": "bilstm"}, states[real])):
        model = headed(family)
        Probe(standardise=True, pooling="mean", **fields).prepare(model, context_of(batch))
        head = model.base_model.probe_head
        torch.testing.assert_close(head.mean, rows.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(head.deviation, rows.std(0, correction=0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_set_of_heads(kind, check_training):
    model = headed()
    KINDS[kind].prepare(trial := headed(), Context())
    check_training(model, KINDS[kind], names_of(trial, "probe_head.", "scalar_mix."), steps=4)
    check_frozen_base(model, headed())


@pytest.mark.parametrize(("family", "head"), CASES)
@pytest.mark.parametrize("kind", ["mlp", "mix, bilstm"])
def test_families_and_heads(family, head, kind, tmp_path):
    model = trained(KINDS[kind], headed(family, head), rows_for(family, head))
    check_frozen_base(model, headed(family, head))
    check_round_trips(model, family, tmp_path)


def test_heads_keep_the_encoder_in_eval_mode():
    for kind in KINDS:
        model = headed(hidden_dropout_prob=0.5)
        KINDS[kind].prepare(model, Context())
        model.train()
        states = [model.bert(**padded()).last_hidden_state[padded()["attention_mask"].bool()] for _ in range(2)]
        torch.testing.assert_close(*states, atol=1e-6, rtol=1e-5)
        learned = kind != "mean"
        assert states[0].requires_grad == learned and model.bert.training and model.bert.encoder.training


@pytest.mark.parametrize("kind", ["mlp", "bilstm"])
def test_heads_learn_sixteen_examples(kind):
    model, batch, method = headed(), labelled(), KINDS[kind]
    method.prepare(model, Context())
    runs = encoder_rows(model)
    fit(model, [method], [batch], steps=120, learning_rate=1e-2)
    assert accuracy(model, batch) == 1.0 and sum(runs) == 16


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_standardised_features(cache, family):
    """Mean 0 and variance 1 over the training rows: of the token that the model's own head reads, or of all."""
    batch = padded(12, 9)
    context = context_of(batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = headed(family).base_model(**batch).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        first = states[torch.arange(12), last] if family == "llama" else states[:, 0]
    for method, rows in (
        (Probe(standardise=True, cache=cache), first),
        (Probe(standardise=True, cache=cache, head="bilstm"), states[real]),
    ):
        model = headed(family)
        method.prepare(model, context)
        head = model.base_model.probe_head
        torch.testing.assert_close(head.mean, rows.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(head.deviation, rows.std(0, correction=0), atol=1e-5, rtol=1e-4)
        assert not head.mean.requires_grad and "mean" in head.state_dict()
    tokens = headed(family, "token")
    Probe(standardise=True, cache=cache).prepare(tokens, context)
    torch.testing.assert_close(tokens.base_model.probe_head.mean, states[real].mean(0), atol=1e-5, rtol=1e-4)


def test_standardising_encodes_every_row_once(tmp_path):
    batch = padded(12, 9)
    model, method = headed(), Probe(standardise=True)
    runs = encoder_rows(model)
    method.prepare(model, context_of(batch))
    logits(model, batch)
    assert sum(runs) == 12
    method.finalize(model)
    check_round_trips(model, "bert", tmp_path)
    with pytest.raises(UserError, match="needs training rows"):
        Probe(standardise=True).prepare(headed(), Context())
    flat = headed()
    with torch.no_grad():
        flat.bert.encoder.layer[1].output.LayerNorm.weight[3] = 0
    Probe(standardise=True).prepare(flat, context_of(batch))
    assert flat.bert.probe_head.deviation[3] == 1 and torch.isfinite(logits(flat, batch)).all()


def test_a_ridge_probe_is_the_normal_equations_solution():
    """Standardised features, squared error and a penalty: gradient descent ends where algebra says."""
    model = headed("distilbert", "token", num_labels=1)
    Probe().prepare(model, Context())
    batch = padded(6, 9)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        features = model.distilbert(**batch).last_hidden_state[real].double()
        target = torch.randn(len(features), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.cat([features, torch.ones(len(features), 1)], 1)
    want = torch.linalg.solve(x.t() @ x + 0.5 * torch.eye(33), x.t() @ target)
    head = model.classifier.double()
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = (head(features) - target).square().sum()
        value = value + 0.5 * sum(p.square().sum() for p in head.parameters())
        value.backward()
        return value

    for _ in range(5):
        optimiser.step(loss)
    got = torch.cat([head.weight[0], head.bias]).detach()
    torch.testing.assert_close(got, want[:, 0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["mlp", "mix, bilstm"])
def test_memory_and_nf4(kind):
    method = KINDS[kind].model_copy(update={"cache": False})
    check_checkpointing(method, "bert")
    check_nf4(method, "bert")


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind):
    model = headed()
    KINDS[kind].prepare(model, Context())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**labelled(4)).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in trainable(model))


def test_bare_is_the_base():
    for kind in KINDS:
        model = headed()
        KINDS[kind].prepare(model, Context())
        KINDS[kind].finalize(model)
        with bare():
            assert torch.equal(logits(model, padded()), logits(headed(), padded()))


def test_fields_that_are_refused():
    with pytest.raises(ValidationError, match="size is for head 'mlp' or 'bilstm'"):
        Probe(size=4)
    with pytest.raises(ValidationError, match="cache keeps the last layer's states alone"):
        Probe(features="scalar_mix", cache=True)
    assert Probe().caches and not Probe(features="scalar_mix").caches and not Probe(cache=False).caches
    with pytest.raises(UserError, match="lets a language model see later tokens"):
        Probe(head="bilstm").prepare(tiny("llama"), Context())
    model = headed()
    KINDS["mlp"].prepare(model, Context())
    KINDS["mlp"].finalize(model)
    with pytest.raises(UserError, match="an earlier stage left a probe's head"):
        KINDS["mlp"].prepare(model, Context())
    for other in (headed(head="token"), tiny("llama")):
        with pytest.raises(UserError, match="leave it out for this task"):
            Probe(pooling="mean").prepare(other, Context())
    assert "removes hidden" in conflict([Probe(cache=False, pooling="mean"), Structured(hidden=0.5)])
    assert "removes hidden" in conflict([Probe(cache=False, head="mlp"), Structured(hidden=0.5)])
    assert conflict([Probe(cache=False), Structured(hidden=0.5)]) is None


def test_the_mix_learns_without_weight_decay():
    method = KINDS["mix"]
    model = trained(method, headed(), labelled(), steps=3)
    assert mix_of(model).weights.abs().min() > 0
    (group,) = method.param_groups(model, Context())
    assert group["weight_decay"] == 0.0 and KINDS["mlp"].param_groups(model, Context()) == []


@pytest.mark.parametrize("kind", ["plain", "bilstm", "mix"])
def test_passes_learn_in_a_frozen_encoder(kind):
    """Ranges, and the importance of parts, are learned although the encoder has neither dropout nor training."""
    method = Probe(cache=False) if kind == "plain" else KINDS[kind].model_copy(update={"cache": False})
    ffn, int8 = Structured(ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5), Int8()
    transforms = [method, ffn, int8]
    model = headed(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    for transform in transforms:
        transform.prepare(model, Context(transforms))
    fit(model, transforms, [labelled(8)], 1)
    model.train()
    states = [model.bert(**labelled(8)).last_hidden_state for _ in range(2)]
    assert all(q.ready for q in quantizers(model)) and len(quantizers(model)) == 13
    assert all(gate.importance.abs().sum() > 0 for gate in Parts.of(model, "structured").ffn)
    # No dropout; ranges still move, a little.
    assert (states[0] - states[1])[labelled(8)["attention_mask"].bool()].abs().max() < 0.2
    model.eval()
    before = logits(model, padded())
    for transform in transforms:
        transform.finalize(model)
    torch.testing.assert_close(logits(model, padded()), before, atol=1e-4, rtol=1e-4)


def test_features_of_another_precision_are_others():
    """What bf16 autocast left in the cache is not what fp32 computes with."""
    model, batch = prepared(), padded()
    want = logits(tiny(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model, batch)
    assert not torch.equal(rough.float(), want)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-6, rtol=1e-5)


def test_statistics_do_not_fill_the_cache_before_a_base_is_packed():
    from compressft.passes.nf4 import Nf4

    rows = [{"input_ids": list(range(5, 9 + i)), "attention_mask": [1] * (4 + i)} for i in range(6)]
    model, methods = tiny(), (Probe(standardise=True), Nf4())
    context = Context(methods, data=TrainingData(None, rows, collated, lambda _: rows, 16, list))
    for one in sorted(methods, key=lambda one: one.order):
        one.prepare(model, context)
    batch = collated(rows)
    cached = logits(model, batch)
    model.bert.forward.cache = None
    torch.testing.assert_close(cached, logits(model, batch), atol=1e-5, rtol=1e-5)


def collated(rows):
    length = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [0] * (length - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_a_language_model_generates_with_a_cache(cache, mask):
    method, model = Probe(head="mlp", cache=cache), tiny("llama")
    method.prepare(model, Context())
    shaken(model, "probe_head")
    batch = padded(2, 6, left=True) if mask else {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**batch, use_cache=False, **settings)
    assert torch.equal(model.generate(**batch, **settings), plain)
