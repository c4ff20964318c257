"""Rewritten rows: how many, how different, the same for a seed, and without labels."""

from collections import Counter

import pytest

from compressft.data.augment import rewritten
from compressft.data.rows import ROW_KEY
from compressft.data.source import AugmentConfig
from compressft.errors import UserError

WORDS = [f"w{i}" for i in range(40)]
ROWS = [{"text": " ".join(WORDS[i : i + 12]), "label": "a", ROW_KEY: f"f:{i}"} for i in range(28)]
STILL = {"mask": 0.0, "replace": 0.0, "drop": 0.0, "crop": 0.0}


def made(rows=ROWS, inputs=("text",), token="[MASK]", seed=0, **changes):
    return list(rewritten(rows, inputs, AugmentConfig(**changes), token, seed))


@pytest.mark.parametrize(("copies", "number"), [(1, 28), (0.5, 14), (3.5, 98)])
def test_so_many_copies_without_labels(copies, number):
    rows = made(copies=copies)
    assert len(rows) == number and all(row.keys() == {"text", ROW_KEY} for row in rows)
    assert len({row["text"] for row in rows}) > 0.9 * number
    # A short row may come out as it was.
    assert len({row["text"] for row in rows} & {row["text"] for row in ROWS}) <= 0.2 * number


def test_seeded():
    assert made(seed=1) == made(seed=1) != made(seed=2)


def test_nothing_to_do_gives_the_rows_again():
    assert [row["text"] for row in made(**{**STILL, "copies": 1.0})] == [row["text"] for row in ROWS]


@pytest.mark.parametrize(("field", "share"), [("mask", 0.3), ("replace", 0.4), ("drop", 0.2)])
def test_probabilities_per_word(field, share):
    """Each of the three happens to that share of the words (within four standard deviations), the others do not."""
    rows = made(**{**STILL, field: share, "copies": 20.0})
    total = 20 * 28 * 12
    near = 4 * (share * (1 - share) / total) ** 0.5
    texts = [row["text"].split() for row in rows]
    masked = sum(words.count("[MASK]") for words in texts) / total
    left_out = 1 - sum(map(len, texts)) / total
    assert abs(masked - (share if field == "mask" else 0)) <= (near if field == "mask" else 0)
    assert abs(left_out - (share if field == "drop" else 0)) <= (near if field == "drop" else 0)
    if field == "replace":
        sources = [ROWS[number % 28]["text"].split() for number in range(len(texts))]
        moved = sum(a != b for old, new in zip(sources, texts, strict=True) for a, b in zip(old, new, strict=True))
        # A word may be replaced by itself.
        assert share - 3 * near - 0.05 < moved / total <= share + near
        assert set(Counter(w for words in texts for w in words)) <= set(WORDS)


def test_cropping_keeps_a_run_of_words():
    rows = made(**{**STILL, "crop": 1.0, "copies": 2.0})
    for number, row in enumerate(rows):
        assert row["text"] in ROWS[number % 28]["text"] and 2 <= len(row["text"].split()) < 12


def test_no_text_becomes_empty():
    rows = [{"text": "one", ROW_KEY: "f:0"}, {"text": "two words", ROW_KEY: "f:1"}]
    assert all(row["text"] for row in made(rows, drop=0.9, mask=0.0, replace=0.0, copies=200.0))


def test_pairs_and_words():
    pairs = [{"text": "a b c", "text_b": "d e f", ROW_KEY: "f:0"}] * 3
    assert {"text", "text_b", ROW_KEY} == made(pairs, ("text", "text_b"), copies=1.0)[0].keys()
    for row in made(pairs, ("text", "text_b"), replace=0.9, mask=0.0, drop=0.0, copies=30.0):
        assert set(row["text"].split()) <= set("abc") and set(row["text_b"].split()) <= set("def")
    tokens = [{"tokens": ["New", "York"], "tags": ["B", "I"], ROW_KEY: "f:0"}]
    assert all(isinstance(row["tokens"], list) and "tags" not in row for row in made(tokens, ("tokens",)))


def test_refuses():
    with pytest.raises(UserError, match=r"data\.augment\.mask: the tokenizer has no mask token"):
        made(token=None)
    assert made(token=None, **{**STILL, "drop": 0.1})
    with pytest.raises(ValueError, match="sum must be below 1"):
        AugmentConfig(mask=0.5, replace=0.5)
