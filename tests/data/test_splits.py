"""Splits: columns are checked row by row; carving, balancing and limiting are seeded, disjoint and keep every class."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from compressft.data.rows import ROW_KEY
from compressft.data.source import DataConfig
from compressft.data.splits import load_splits
from compressft.errors import UserError
from compressft.tasks import TASKS
from compressft.tasks.causal import CausalLM
from compressft.tasks.classify import SequenceClassification
from compressft.tasks.regress import Regression
from compressft.tasks.tag import TokenClassification
from compressft.tasks.task import Fields
from tests.data.lists import balanced, canonical_rows, carve

SIZES = {"many": 97, "some": 20, "few": 3, "two": 2, "one": 1}
FIELDS = SequenceClassification.fields


def rows_of(sizes=SIZES, seed=0):
    rows = [{"text": f"{name} {i}", "label": name} for name, size in sizes.items() for i in range(size)]
    random.Random(seed).shuffle(rows)
    return [row | {ROW_KEY: f"f:{i}"} for i, row in enumerate(rows, 1)]


def labels(rows):
    return Counter(row["label"] for row in rows)


def place(rows):
    return [row[ROW_KEY] for row in rows]


def refusal(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Canonical rows.


def placed(*rows):
    return [row | {ROW_KEY: f"f.jsonl:{i}"} for i, row in enumerate(rows, 1)]


def test_columns_are_renamed_and_others_left_out():
    rows = placed({"question": "hi", "intent": 3, "id": 1}, {"question": "ho", "intent": True, "id": 2})
    assert canonical_rows(rows, {"text": "question", "label": "intent"}, FIELDS) == placed(
        {"text": "hi", "label": "3"}, {"text": "ho", "label": "True"}
    )


def test_optional_column_is_used_where_it_is_there():
    rows = placed({"text": "a", "text_b": "b", "label": "x"}, {"text": "c", "text_b": "d", "label": "y"})
    assert [row["text_b"] for row in canonical_rows(rows, {}, FIELDS)] == ["b", "d"]
    assert "text_b" not in canonical_rows(placed({"text": "a", "label": "x"}), {}, FIELDS)[0]


GOOD = {"text": "a", "label": "x"}


@pytest.mark.parametrize(
    ("task", "rows", "columns", "said"),
    [
        (
            "sequence-classification",
            [{"txt": "a", "label": "x"}],
            {},
            ["no column 'text'", "columns: txt, label", "mean 'txt'", "data.columns.text"],
        ),
        ("sequence-classification", [GOOD], {"label": "lable"}, ["no column 'lable' for 'label'", "mean 'label'"]),
        ("sequence-classification", [GOOD], {"text_b": "other"}, ["no column 'other' for 'text_b'"]),
        (
            "sequence-classification",
            [GOOD],
            {"lable": "x"},
            ["data.columns: 'lable'", "text, label, text_b", "mean 'label'"],
        ),
        ("sequence-classification", [GOOD, {"text": "b"}], {}, ["f.jsonl:2", "column 'label' is empty"]),
        ("sequence-classification", [GOOD, {"text": None, "label": "x"}], {}, ["f.jsonl:2", "column 'text' is empty"]),
        ("sequence-classification", [GOOD | {"text_b": "b"}, GOOD], {}, ["f.jsonl:2", "column 'text_b' is empty"]),
        ("sequence-classification", [GOOD, GOOD | {"text_b": "b"}], {}, ["f.jsonl:1", "column 'text_b' is empty"]),
        (
            "sequence-classification",
            [{"text": ["a", "b"], "label": "x"}],
            {},
            ["f.jsonl:1", "text wants one text, this is a list of 2", "with blanks between", "token-classification"],
        ),
        ("sequence-classification", [{"text": [1], "label": "x"}], {}, ["f.jsonl:1", "text wants text; got list [1]"]),
        (
            "sequence-classification",
            [{"text_b": "b", "text_a": "a", "label": "x"}],
            {},
            ["no column 'text'", "mean 'text_a', with 'text_b' for 'text_b'?", "data.columns.text"],
        ),
        (
            "regression",
            [{"score": 1, "hypothesis": "b", "premise": "a"}],
            {},
            ["no column 'text'", "mean 'premise', with 'hypothesis' for 'text_b'?"],
        ),
        (
            "sequence-classification",
            [{"text_a": "a", "label": "x"}],
            {},
            ["no column 'text'", "(did you mean 'text_a'?)"],
        ),
        (
            "sequence-classification",
            [{"text": "a", "label": {}}],
            {},
            ["f.jsonl:1", "label wants text or a whole number; got dict"],
        ),
        (
            "regression",
            [{"text": "a", "score": 1}, {"text": "a", "score": "high"}],
            {},
            ["f.jsonl:2", "score 'high' is not a number"],
        ),
        ("regression", [{"text": "a", "score": float("nan")}], {}, ["f.jsonl:1", "column 'score' is empty"]),
        ("regression", [{"text": "a", "score": "inf"}], {}, ["f.jsonl:1", "score 'inf' is not a number"]),
        ("regression", [{"text": "a", "score": [1]}], {}, ["f.jsonl:1", "score [1] is not a number"]),
        (
            "token-classification",
            [{"tokens": "a b", "tags": ["O"]}],
            {},
            ["tokens wants a list of strings; got str 'a b'"],
        ),
        ("token-classification", [{"tokens": ["a"], "tags": [1]}], {}, ["tags wants a list of strings; got list [1]"]),
        ("causal-lm", [{"body": "a"}], {}, ["no column 'text'"]),
    ],
)
def test_wrong_row_or_column_is_refused(task, rows, columns, said):
    message = refusal(canonical_rows, placed(*rows), columns, TASKS[task].fields)
    for part in said:
        assert part in message


def test_scores_become_numbers():
    rows = canonical_rows(placed({"text": "a", "score": "2.5"}, {"text": "b", "score": 3}), {}, Regression.fields)
    assert [row["score"] for row in rows] == [2.5, 3.0]


def test_every_task_says_its_fields():
    assert TokenClassification.fields == Fields(("tokens", "tags"), answer="tags", words=("tokens", "tags"))
    assert TokenClassification.fields.inputs == ("tokens",)
    assert CausalLM.fields.all == ("text", "prompt")
    assert all(task.fields.label in (None, *task.fields.required) for task in TASKS.values())


def test_a_task_names_its_own_columns_and_their_kinds():
    fields = Fields(("mention", "years"), ("aliases",), answer="years", numbers=("years",), words=("aliases",))
    rows = [
        {"mention": "Ann", "years": "3", "aliases": ["A"], "more": 1},
        {"mention": "Bob", "years": 4.5, "aliases": []},
    ]
    found = canonical_rows(placed(*rows), {"mention": "mention"}, fields)
    assert [{k: v for k, v in row.items() if k != ROW_KEY} for row in found] == [
        {"mention": "Ann", "years": 3.0, "aliases": ["A"]},
        {"mention": "Bob", "years": 4.5, "aliases": []},
    ]
    for broken, said in (
        ({"years": "three"}, "years 'three' is not a number"),
        ({"aliases": "A"}, "aliases wants a list of strings; got str 'A'"),
        ({"mention": 3}, "mention wants text; got int 3"),
    ):
        assert said in refusal(canonical_rows, placed({**rows[0], **broken}), {}, fields)
    asked = Fields.of_inputs(fields)
    assert asked.all == ("mention", "aliases") and asked.words == ("aliases",)


# Carving.


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("seed", [0, 1])
def test_carve_is_stratified(fraction, seed):
    rows = rows_of()
    train, validation = carve(rows, fraction, "label", seed)
    assert not set(place(train)) & set(place(validation))
    # The union in the order of rows.
    assert sorted(train + validation, key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert validation == sorted(validation, key=rows.index)
    for name, size in SIZES.items():
        kept, given = labels(train)[name], labels(validation)[name]
        assert kept >= 1
        if size == 1:
            assert given == 0
        else:
            assert given >= 1
            # As near to the fraction as one row for each side allows.
            assert abs(given - fraction * size) <= 0.5 or given in (1, size - 1)


def test_carve_is_a_function_of_the_seed():
    rows = rows_of()
    assert carve(rows, 0.2, "label", 3) == carve(rows, 0.2, "label", 3)
    assert carve(rows, 0.2, "label", 3) != carve(rows, 0.2, "label", 4)


def test_carve_without_labels_takes_the_fraction():
    rows = rows_of()
    train, validation = carve(rows, 0.25, None, 0)
    assert len(validation) == round(0.25 * len(rows))
    assert sorted(place(train + validation)) == sorted(place(rows))


def test_carve_of_too_few_rows_is_refused():
    assert "too few rows" in refusal(carve, rows_of({"a": 1, "b": 1}), 0.5, "label", 0)


# Balancing.


@pytest.mark.parametrize("per_class", [2, 3, 20, 500])
def test_balanced_keeps_so_many_of_each_class(per_class):
    rows = rows_of()
    kept = balanced(rows, per_class, "label", 0)
    assert labels(kept) == {name: min(size, per_class) for name, size in SIZES.items()}
    assert kept == [row for row in rows if row in kept]
    assert kept == balanced(rows, per_class, "label", 0)


def test_balanced_draws_with_the_seed():
    rows = rows_of()
    assert balanced(rows, 3, "label", 0) != balanced(rows, 3, "label", 1)
    # A draw, not the first rows of each class.
    assert any(balanced(rows, 3, "label", s) != balanced(rows[::-1], 3, "label", s)[::-1] for s in range(3))


# Whole recipes.


@pytest.fixture
def files(tmp_path):
    """Writes the given splits and returns the configuration's file fields."""

    def files(**splits):
        paths = {}
        for name, rows in splits.items():
            paths[name] = str(tmp_path / f"{name}.jsonl")
            with open(paths[name], "w", encoding="utf-8") as file:
                file.writelines(json.dumps({k: v for k, v in row.items() if k != ROW_KEY}) + "\n" for row in rows)
        return paths

    return files


def test_validation_is_carved_out_of_train_alone(files):
    paths = files(train=rows_of(), test=rows_of({"many": 5, "one": 2}))
    splits = load_splits(DataConfig(**paths, validation_fraction=0.2, seed=7), FIELDS)
    texts = [row["text"] for row in (*splits.train, *splits.validation)]
    assert sorted(texts) == sorted(row["text"] for row in rows_of())
    assert len(splits.validation) == pytest.approx(0.2 * sum(SIZES.values()), abs=len(SIZES))
    assert [row["text"] for row in splits.test] == [row["text"] for row in rows_of({"many": 5, "one": 2})]
    assert splits.report_split == "test"
    assert load_splits(DataConfig(**paths, validation_fraction=0.2, seed=7), FIELDS) == splits
    assert load_splits(DataConfig(**paths, validation_fraction=0.2, seed=8), FIELDS) != splits


def test_several_files_are_read_one_after_the_other(files, tmp_path):
    paths = files(train=rows_of(), test=rows_of({"many": 5}))
    splits = load_splits(DataConfig(train=(paths["train"], paths["test"]), validation=paths["test"]), FIELDS)
    assert [row["text"] for row in splits.train] == [row["text"] for row in rows_of() + rows_of({"many": 5})]
    assert len({row[ROW_KEY] for row in splits.train}) == len(splits.train), "a message could not name the row"
    with pytest.raises(UserError, match=r"none\.jsonl"):
        load_splits(DataConfig(train=(paths["train"], str(tmp_path / "none.jsonl"))), FIELDS)


def test_given_validation_is_used_whole(files):
    paths = files(train=rows_of(), validation=rows_of({"some": 4}))
    splits = load_splits(DataConfig(**paths), FIELDS)
    assert (len(splits.train), labels(splits.validation)) == (sum(SIZES.values()), {"some": 4})
    assert splits.test == []
    assert splits.report_split == "validation"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_label_that_train_lacks_is_refused(files, split):
    paths = files(train=rows_of(), **{split: rows_of({"some": 4, "new": 1})})
    message = refusal(load_splits, DataConfig(**paths), FIELDS)
    assert "label 'new' does not occur in train" in message
    assert f"{split}.jsonl:" in message


def test_per_class_balances_train_alone(files):
    paths = files(train=rows_of(), validation=rows_of(seed=1), test=rows_of(seed=2))
    splits = load_splits(DataConfig(**paths, per_class=2), FIELDS)
    assert labels(splits.train) == {name: min(size, 2) for name, size in SIZES.items()}
    assert labels(splits.validation) == labels(splits.test) == SIZES


@pytest.mark.parametrize("limit", [2, 3, 10, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_limit_bounds_every_split_and_keeps_labels_known(files, limit, seed):
    sizes = {f"c{i}": 4 for i in range(12)}
    paths = files(train=rows_of(sizes), test=rows_of(sizes, seed=1))
    splits = load_splits(DataConfig(**paths, limit=limit, seed=seed, validation_fraction=0.25), FIELDS)
    everything = load_splits(DataConfig(**paths, seed=seed, validation_fraction=0.25), FIELDS)
    assert len(splits.train) == min(limit, len(everything.train))
    assert 1 <= len(splits.validation) <= limit
    assert len(splits.test) <= limit
    known = TASKS["sequence-classification"].labels_of(splits.known)
    assert set(known) == set(sizes), "labels are those of the rows as given, whatever was left out"
    used = len(splits.train) + len(splits.validation)
    assert splits.known == everything.known and splits.left_out == len(splits.known) - used
    assert all(row in everything.train for row in splits.train)
    assert splits == load_splits(DataConfig(**paths, limit=limit, seed=seed, validation_fraction=0.25), FIELDS)


def test_sample_with_files_of_ones_own(files):
    paths = files(test=[{"text": "where is my card", "label": "card_arrival"}])
    splits = load_splits(DataConfig(sample="banking77", limit=50, **paths), FIELDS)
    assert len(splits.train) == 50
    assert [row["text"] for row in splits.test] in ([], ["where is my card"])


# Rows without labels.


def test_unlabelled_rows_come_from_files_and_from_rewriting(files):
    more = [{"text": f"more {i}", ROW_KEY: f"f:{i}"} for i in range(5)]
    paths = files(train=rows_of(), unlabelled=more)
    splits = load_splits(DataConfig(**paths, augment={"copies": 2.0}, seed=3), FIELDS, "[MASK]")
    assert [row["text"] for row in splits.unlabelled[:5]] == [row["text"] for row in more]
    assert len(splits.unlabelled) == 5 + 2 * len(splits.train)
    assert all("label" not in row for row in splits.unlabelled)
    # Nothing of the validation rows is rewritten: their numbers do not occur.
    words = {word for row in splits.unlabelled[5:] for word in row["text"].split()} - {"[MASK]"}
    assert words <= {word for row in splits.train for word in row["text"].split()}
    assert len(load_splits(DataConfig(**paths, limit=4), FIELDS).unlabelled) == 4


def test_unlabelled_rows_need_a_text(files):
    paths = files(train=rows_of(), unlabelled=[{"body": "a", ROW_KEY: "f:1"}])
    with pytest.raises(UserError, match="no column 'text'"):
        load_splits(DataConfig(**paths), FIELDS)
    assert load_splits(DataConfig(**files(train=rows_of())), FIELDS).unlabelled == []
