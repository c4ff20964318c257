"""Features on the disk: what `encode` gives, made once, in parts, by several processes, and resumed."""

import multiprocessing

import numpy as np
import pytest

from compressft.data import store
from compressft.data.rows import ROW_KEY
from compressft.data.splits import Source
from compressft.errors import UserError
from compressft.model.source import load_tokenizer
from compressft.tasks import TASKS, encode, make_task
from compressft.tasks.encode import about, cut, encoded, lengths_of, longest_first, tokens_of
from tests.tiny_folder import write_jsonl

TEXTS = [f"{'the river ' * (i % 7)}runs by the old town number {i}" for i in range(230)]
ROWS = {
    "sequence-classification": [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(TEXTS)],
    "regression": [{"text": text, "text_b": "a town", "score": i / 7} for i, text in enumerate(TEXTS)],
    "token-classification": [
        {"tokens": (words := text.split()), "tags": ["O"] * len(words)} for text in TEXTS if text.split()
    ],
    "embedding": [{"text": text, "text_b": f"{text} again"} for text in TEXTS],
    "masked-lm": [{"text": text} for text in TEXTS],
    "causal-lm": [{"text": text} for text in TEXTS],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(encode, "ROWS", 25)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("minilm")


def table_of(tmp_path, name, rows=None):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS[name] if rows is None else rows)
    return Source.of_files((str(file),)).table({}, TASKS[name].fields)


def task_of(name, tokenizer, length=16):
    labels = {"sequence-classification": ("a", "b"), "token-classification": ("O",)}.get(name, ())
    return make_task(name, tokenizer, length, labels)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", ROWS)
def test_the_same_features_as_at_once(name, workers, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "usable_cores", lambda: workers)
    table, task = table_of(tmp_path, name), task_of(name, tokenizer)
    want = task.encode(list(table))
    got = encoded(table, task)
    assert repr(list(got)) == repr(want), "the same values of the same types, also where they are no numbers"
    assert lengths_of(got, task).tolist() == [task.length(row) for row in want]
    assert tokens_of(got, task).tolist() == [task.tokens(row) for row in want]
    assert repr(list(longest_first(got, task))) == repr(sorted(want, key=task.length, reverse=True))
    assert cut([table], task) == cut([list(table)], task)
    assert not multiprocessing.active_children()


def test_unpacked_masks_do_not_depend_on_parts(tokenizer, tmp_path):
    settings = {"type": "masked-lm", "packed": False}
    task = make_task(TASKS["masked-lm"].settings_class(**settings), tokenizer, 16, ())
    table = table_of(tmp_path, "masked-lm")
    assert list(encoded(table, task)) == task.encode(list(table))
    assert "longer than data.max_length" in cut([table], task)


def test_without_labels(tokenizer, tmp_path):
    table, task = table_of(tmp_path, "sequence-classification"), task_of("sequence-classification", tokenizer)
    assert list(encoded(table, task, unlabelled=True)) == task.encode_unlabelled(list(table))


def counted(monkeypatch, task):
    calls, own = [], type(task).encode
    monkeypatch.setattr(encode, "usable_cores", lambda: 1)
    monkeypatch.setattr(type(task), "encode", lambda self, rows: calls.append(len(rows)) or own(self, rows))
    return calls


def test_what_is_there_is_not_made_again(tokenizer, tmp_path, monkeypatch):
    table, task = table_of(tmp_path, "sequence-classification"), task_of("sequence-classification", tokenizer)
    calls = counted(monkeypatch, task)
    first = encoded(table, task)
    assert calls == [25] * 9 + [5]
    assert encoded(table, task) == first and len(calls) == 10
    # How a text was cut and padded last is no part of a tokenizer.
    tokenizer("a", truncation=True, max_length=4, padding="max_length")
    assert encoded(table, task) == first and len(calls) == 10
    assert len(encoded(table.select([4, 2]), task)) == 2 and calls[10:] == [2]


def test_an_interrupted_encoding_goes_on(tokenizer, tmp_path, monkeypatch):
    table, task = table_of(tmp_path, "sequence-classification"), task_of("sequence-classification", tokenizer)
    calls, write = counted(monkeypatch, task), encode._Job.write

    def killed(self, folder, number):
        if number == 4:
            raise KeyboardInterrupt
        write(self, folder, number)

    monkeypatch.setattr(encode._Job, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        encoded(table, task)
    monkeypatch.setattr(encode._Job, "write", write)
    assert sum(calls) == 100
    assert list(encoded(table, task)) == task.encode(list(table)) and sum(calls) == 230 + 230


@pytest.mark.parametrize("workers", [1, 3])
def test_a_row_that_cannot_be_encoded_is_said(workers, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "usable_cores", lambda: workers)
    rows = [*ROWS["token-classification"][:180], {"tokens": ["a", "b"], "tags": ["O"]}, *ROWS["token-classification"]]
    task = task_of("token-classification", tokenizer)
    with pytest.raises(UserError, match=r"rows\.jsonl:181: 1 tags for 2 tokens"):
        encoded(table_of(tmp_path, "token-classification", rows), task)
    assert not multiprocessing.active_children()


def test_another_task_or_tokenizer_is_another_key(tokenizer):
    from compressft.passes.shared.trim import trim

    task = task_of("sequence-classification", tokenizer)
    other = [
        task_of("sequence-classification", tokenizer, 17),
        make_task("sequence-classification", tokenizer, 16, ("b", "a")),
        task_of("causal-lm", tokenizer),
        task.remade(trim(tokenizer, range(1000, 3000))[0]),
    ]
    keys = [about(one) for one in (task, *other)]
    assert len(set(keys)) == 5 and about(task) == keys[0]


def test_what_training_has_encoded_export_reads(tokenizer, tmp_path):
    """The tokenizer that was saved, and a trained model's configuration, are no other ones."""
    from tests.tiny import tiny

    tokenizer.save_pretrained(tmp_path)
    before = make_task("sequence-classification", tokenizer, 16, ("a", "b"), tiny("bert").config)
    after = make_task(
        "sequence-classification", load_tokenizer(str(tmp_path)), 16, ("a", "b"), tiny("bert", seed=1).config
    )
    after.config.problem_type = "single_label_classification"
    assert about(after) == about(before)


def test_lists_stay_lists(tokenizer, cache):
    task = task_of("sequence-classification", tokenizer)
    rows = [{**row, ROW_KEY: "x"} for row in ROWS["sequence-classification"][:3]]
    assert encoded(rows, task) == task.encode(rows) and not cache.exists()
    assert encoded([], task) == [] and np.array_equal(lengths_of([], task), [])
