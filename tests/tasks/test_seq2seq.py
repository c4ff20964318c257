"""Sequence to sequence: what the decoder is given, what is written, and how it is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from compressft.data.rows import ROW_KEY
from compressft.errors import UserError
from compressft.evaluation.logits import model_logits, scoring_run
from compressft.recipe.program import parse_task
from compressft.tasks import make_task
from compressft.tasks.encode import cut
from compressft.tasks.task import IGNORE
from compressft.tasks.written import bleu, bleu_counts, rouge_l
from tests.tiny import PAIRS

TEXTS = ["a short one", "where is the card that I ordered two weeks ago?", "hm"]
TARGETS = ["short", "a card is late, and its owner asks for it", "hm hm hm"]
# MiniLM's own: padding 0, [SEP] 102.
SPECIAL = {"pad_token_id": 0, "eos_token_id": 102, "bos_token_id": 101}


def rows_of(**columns):
    return [
        dict(zip(columns, values, strict=True)) | {ROW_KEY: f"f:{i}"}
        for i, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]


def pair_model(family, tokenizer):
    """A tiny random encoder-decoder with MiniLM's pieces."""
    settings = {**PAIRS[family][1], "vocab_size": len(tokenizer), **SPECIAL}
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(family, **settings)).eval()


def task_of(tokenizer, config=None, length=32, **settings):
    return make_task(parse_task({"type": "seq2seq", **settings}), tokenizer, length, (), config)


# Rows.


@pytest.mark.parametrize("family", PAIRS)
def test_the_decoder_is_given_what_transformers_would_give_it(tokenizer, family):
    """Its loss and logits are those of labels alone."""
    model = pair_model(family, tokenizer)
    task = task_of(tokenizer, model.config, target_length=8)
    batch = task.collate(task.encode(rows_of(text=TEXTS, target=TARGETS)))
    assert batch["labels"][0, 3:].eq(IGNORE).all() and batch["labels"].shape[1] == 8
    with torch.no_grad():
        ours = model(**task.asked(batch))
        theirs = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    torch.testing.assert_close(task.loss(ours, batch), theirs.loss)
    real = batch["labels"].ne(IGNORE)
    torch.testing.assert_close(ours.logits[real], theirs.logits[real])


@pytest.mark.parametrize("family", PAIRS)
def test_outputs_by_row_do_not_depend_on_the_batch(tokenizer, family):
    model = pair_model(family, tokenizer)
    task = task_of(tokenizer, model.config, target_length=8)
    features = task.encode(rows_of(text=TEXTS, target=TARGETS))
    alone, together = (model_logits(model, task, features, batch) for batch in (1, 3))
    for one, other, feature in zip(alone, together, features, strict=True):
        assert one.shape == (len(feature["labels"]), len(tokenizer))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


def test_prefix_and_lengths(tokenizer):
    task = task_of(tokenizer, length=6, target_length=4, prefix="sum: ")
    rows = rows_of(text=TEXTS, target=TARGETS)
    features = task.encode(rows)
    assert features[0]["input_ids"] == tokenizer("sum: a short one", truncation=True, max_length=6)["input_ids"]
    assert [len(one["labels"]) for one in features] == [3, 4, 4]
    assert all(one["labels"][-1] == tokenizer.sep_token_id for one in features), "the end is learned, cut or not"
    assert [task.length(one) for one in features] == [6, 6, 5]
    assert [task.tokens(one) for one in features] == [6 + 3, 6 + 4, 5 + 4]
    assert set(task.pieces(features[2])) == {*features[2]["input_ids"], *features[2]["labels"]}
    said = cut([rows], task)
    assert said == (
        "2 of 3 texts (66.7%) are longer than data.max_length 6 and are cut; "
        "2 of 3 targets (66.7%) are longer than task.target_length 4 and are cut"
    )
    assert cut([rows], task_of(tokenizer)) is None


def test_a_model_without_a_decoder_is_refused(tokenizer):
    task = task_of(tokenizer, transformers.AutoConfig.for_model("bert"))
    with pytest.raises(UserError, match="no decoder_start_token_id; take an encoder-decoder"):
        task.collate(task.encode(rows_of(text=TEXTS, target=TARGETS)))


# What is written.


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_written_does_not_depend_on_the_batch(tokenizer, family, beams):
    model = pair_model(family, tokenizer)
    task = task_of(tokenizer, model.config, target_length=6, beams=beams)
    features = task.encode(rows_of(text=TEXTS, target=TARGETS))
    write = scoring_run(model, task)
    together = write(features)
    assert together.shape[0] == 3 and together.shape[1] <= 7
    for row, feature in enumerate(features):
        alone = write([feature])[0]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (alone, together[row])]
        assert texts[0] == texts[1]


def test_metrics_are_over_whole_references(tokenizer):
    """A target that is cut for training is still wanted whole."""
    task = task_of(tokenizer, target_length=4, metric="bleu")
    rows = rows_of(text=TEXTS, target=TARGETS)
    truth = task.truth(task.encode(rows))
    assert truth.tolist() == TARGETS
    written = [tokenizer(text)["input_ids"] for text in TARGETS]
    width = max(map(len, written))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in written])
    # Texts as this tokenizer gives them back: commas stand apart.
    found = task.metrics(task.evidence(ids, truth).numpy(), truth)
    assert found["rouge_l"] == pytest.approx(1.0)
    short = task.metrics(task.evidence(ids[:, :3], truth).numpy(), truth)
    assert short["rouge_l"] < 0.8 and short["bleu"] < found["bleu"]


words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8)


def longest(one, other):
    """By every subsequence."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return longest(one[:-1], other[:-1]) + 1
    return max(longest(one[:-1], other), longest(one, other[:-1]))


@given(words, words)
def test_rouge_is_f1_of_the_longest_common_subsequence(one, other):
    common = longest(one, other)
    precision, recall = common / max(len(one), 1), common / max(len(other), 1)
    wanted = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(" ".join(one), " ".join(other).upper()) == pytest.approx(wanted)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_bleu_adds_up_to_sacrebleus_own(texts):
    from sacrebleu.metrics.bleu import BLEU

    pairs = [(" ".join(one), " ".join(other)) for one, other in texts]
    wanted = BLEU().corpus_score([one for one, _ in pairs], [[other for _, other in pairs]]).score / 100
    counts = np.sum([bleu_counts(one, other) for one, other in pairs], axis=0)
    assert bleu(counts) == pytest.approx(wanted)
