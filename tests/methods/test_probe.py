"""Linear probe: head only, one encoder pass per example, cached features equal to computed ones, no dropout."""

import pytest
import torch

from compressft.anatomy import anatomy
from compressft.methods.probe import Probe
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.tiny import TINY, batch_for, fit, labelled, logits, padded, tiny

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
        assert "set method.cache to false" in Probe().conflict([other])
        assert Probe(cache=False).conflict([other]) is None
    assert Probe().conflict([]) is None
