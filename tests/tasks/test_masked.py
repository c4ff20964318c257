"""Masked language modelling: how many tokens are hidden, by what, and that training draws again each epoch."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from compressft.data.rows import ROW_KEY
from compressft.errors import UserError
from compressft.evaluation.scores import Scores
from compressft.recipe.program import parse_task
from compressft.run.feed import Corrupted
from compressft.tasks import make_task
from compressft.tasks.corrupt import budget, choose, generator, hide, whole_words
from compressft.tasks.task import IGNORE
from tests.tiny import tiny

TEXTS = ["Unbelievable weatherproofing survives thunderstorms", "a b", "the cat sat on the mat and looked at nothing"]


def rows_of(texts):
    return [{"text": text, ROW_KEY: f"f:{i}"} for i, text in enumerate(texts, 1)]


def task_of(tokenizer, max_length=32, **settings):
    return make_task(parse_task({"type": "masked-lm", **settings}), tokenizer, max_length)


@pytest.mark.parametrize(("length", "hidden"), [(5, 1), (10, 2), (128, 19), (512, 77)])
def test_as_many_are_hidden_as_bert_hides(length, hidden):
    """max(1, round(0.15 * length)), special tokens counted; Python rounds halves to even, as the original does."""
    assert budget(length, 0.15) == hidden


def test_hidden_places_are_eighty_ten_ten():
    vocabulary, n = 1000, 40_000
    ids = hide([5] * n, range(n), 999, vocabulary, generator(0, 0, 0))
    share = Counter("mask" if i == 999 else "same" if i == 5 else "other" for i in ids)
    # Four standard deviations; one random piece of a thousand is the mask, and one the piece itself.
    for name, wanted in (("mask", 0.8), ("other", 0.1), ("same", 0.1)):
        assert abs(share[name] / n - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n) + 2e-4
    assert len({i for i in ids if i not in (5, 999)}) > 900


def test_words_are_hidden_whole_and_never_beyond_the_budget():
    words = [None, 0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 4, None]
    units = whole_words(words)
    assert units == [[1, 2, 3], [4], [5, 6], [7], [8, 9, 10, 11]]
    for seed in range(200):
        places = choose(units, 3, generator(seed, 0, 0))
        assert 1 <= len(places) <= 3
        assert all(set(unit) <= set(places) or not set(unit) & set(places) for unit in units)


def test_a_row_of_one_long_word_still_has_something_to_predict():
    assert choose([[1, 2, 3, 4]], 1, generator(0, 0, 0)) == [1, 2, 3, 4]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("words", [False, True])
def test_labels_are_the_hidden_tokens_and_special_ones_stay(tokenizer, words, packed):
    task = task_of(tokenizer, whole_words=words, packed=packed)
    for feature in task.encode(rows_of(TEXTS)):
        assert feature["input_ids"][0] == tokenizer.cls_token_id
        assert feature["input_ids"][-1] == tokenizer.sep_token_id
        assert len(feature["input_ids"]) <= 32
        hidden = [i for i, label in enumerate(feature["labels"]) if label != IGNORE]
        assert hidden
        for i, (new, old, label) in enumerate(
            zip(feature["input_ids"], feature["whole"], feature["labels"], strict=True)
        ):
            assert label == (old if i in hidden else IGNORE)
            assert i in hidden or new == old
            assert i not in hidden or feature["words"][i] is not None


def test_packed_texts_lose_no_token(tokenizer):
    task = task_of(tokenizer, max_length=8)
    kept = [i for feature in task.encode(rows_of(TEXTS)) for i in feature["whole"]]
    wanted = [i for text in TEXTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    special = set(tokenizer.all_special_ids)
    assert [i for i in kept if i not in special] == wanted


def test_training_hides_others_in_every_epoch_and_the_same_ones_again(tokenizer):
    task = task_of(tokenizer)
    features = task.encode(rows_of(TEXTS * 8))

    def drawn(seed, epoch):
        rows = Corrupted(features, task, seed)
        rows.epoch = epoch
        return [rows[i]["input_ids"] for i in range(len(rows))]

    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2) and drawn(0, 1) != drawn(1, 1)
    # Whoever asks for the rows in another order, or for one alone, sees the same.
    rows = Corrupted(features, task, 0)
    rows.epoch = 1
    assert rows[1]["input_ids"] == drawn(0, 1)[1]


def test_batches_have_no_key_that_a_model_does_not_know(tokenizer):
    task = task_of(tokenizer)
    batch = task.collate(task.encode(rows_of(TEXTS)))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert len({tuple(tensor.shape) for tensor in batch.values()}) == 1


def test_metrics_are_of_the_hidden_tokens_alone(tokenizer):
    task = task_of(tokenizer, packed=False)
    batch = task.collate(task.encode(rows_of(TEXTS)))
    labels = batch["labels"]
    logits = torch.randn(*labels.shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
    keep = labels != IGNORE
    nats = torch.nn.functional.cross_entropy(logits[keep].double(), labels[keep], reduction="mean")
    scores = Scores(task)
    for i in range(len(labels)):
        scores.add(logits[i : i + 1], labels[i : i + 1])
    found = scores.metrics()
    assert found["perplexity"] == pytest.approx(math.exp(min(float(nats), 80.0)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits[keep].argmax(-1) == labels[keep]).double().mean()))
    assert np.isfinite(found["perplexity"])


def test_the_model_minimises_just_that(tokenizer):
    """The library's loss is the mean over hidden tokens, and the output layer is the table of the input."""
    task = task_of(tokenizer)
    model = tiny("bert", architecture="BertForMaskedLM", vocab_size=len(tokenizer))
    batch = task.collate(task.encode(rows_of(TEXTS)))
    out = model(**batch)
    scores = Scores(task)
    scores.add(out.logits.detach(), batch["labels"])
    assert math.exp(float(out.loss.detach())) == pytest.approx(scores.metrics()["perplexity"], rel=1e-4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_tokenizer_without_a_mask_is_refused(tokenizer):
    class Without:
        mask_token_id = None

    with pytest.raises(UserError, match="has no mask token"):
        task_of(Without())
