"""Tables on the disk: the same rows as lists, made once, again where damaged, refused where they cannot be."""

import random

import numpy as np
import pytest

from compressft.data import store
from compressft.data.rows import ROW_KEY
from compressft.data.source import DataConfig
from compressft.data.splits import Source, load_splits
from compressft.data.table import Chain, chained, distinct, taken
from compressft.errors import UserError
from compressft.tasks import TASKS
from tests.tiny_folder import write_jsonl

FIELDS = TASKS["sequence-classification"].fields


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(2500)])


@pytest.fixture
def table(file):
    return Source.of_files((str(file),)).table({}, FIELDS)


def reads(monkeypatch):
    """How often files are read."""
    from compressft.data import splits

    calls, read = [], splits.iterate_rows

    def counted(path):
        calls.append(path)
        return read(path)

    monkeypatch.setattr(splits, "iterate_rows", counted)
    return calls


def test_rows_in_any_order(table, file):
    rows = list(table)
    assert len(rows) == len(table) == 2500
    assert rows[7] == {"text": "row 7", "label": "b", ROW_KEY: f"{file}:8"}
    assert table[7] == rows[7] and table[-1] == rows[-1] and table[990:1010:3] == rows[990:1010:3]
    order = random.Random(0).sample(range(2500), 40)
    some = table.select(order)
    assert list(some) == [rows[i] for i in order] and some[3:5] == [rows[i] for i in order[3:5]]
    assert list(some.select([5, 1])) == [rows[order[5]], rows[order[1]]]
    assert taken(some, [2, 0]) == [rows[order[2]], rows[order[0]]]
    assert some == [rows[i] for i in order] != list(table.select([0]))
    for index in (2500, -2501):
        with pytest.raises(IndexError):
            table[index]
    with pytest.raises(IndexError):
        some[40]


def test_columns(table):
    names, codes = table.select([3, 2, 1]).codes("label")
    assert [names[code] for code in codes] == ["b", "a", "b"]
    assert distinct(table, "label") == ["a", "b"] == distinct(list(table), "label")
    assert distinct(table.select([1]), "label") == ["b"]


def test_lists_of_words_are_flattened(tmp_path):
    rows = [{"tokens": ["x"] * len(tags), "tags": tags} for tags in (["O", "B"], [], ["I"])][::2]
    file = write_jsonl(tmp_path / "tags.jsonl", rows)
    table = Source.of_files((str(file),)).table({}, TASKS["token-classification"].fields)
    assert distinct(table, "tags") == ["B", "I", "O"] == distinct(list(table), "tags")


def test_the_same_rows_have_one_key(table):
    assert table.select([1, 2]).key == table.select(np.array([1, 2])).key != table.select([2, 1]).key


def test_chain(table):
    more = [{"text": "more"}, {"text": "yet more"}]
    both = chained(table.select(range(3)), [], more)
    want = [*table[:3], *more]
    assert isinstance(both, Chain) and list(both) == want and both == want
    assert (
        both[1:5:2] == want[1:5:2] and both[-1] == want[-1] and taken(both, [4, 0, 3]) == [want[i] for i in (4, 0, 3)]
    )
    assert chained(table, []) is table and chained([], []) == []
    with pytest.raises(IndexError):
        both[5]


def test_a_file_is_read_once(file, monkeypatch):
    calls = reads(monkeypatch)
    config = DataConfig(train=str(file))
    first, again = load_splits(config, FIELDS), load_splits(config, FIELDS)
    assert len(calls) == 1 and first == again
    # Other bytes, other columns: read again.
    with file.open("a") as more:
        more.write('{"text": "one more", "label": "a"}\n')
    assert len(load_splits(config, FIELDS).known) == 2501 and len(calls) == 2
    with pytest.raises(UserError, match="no column 'title'"):
        load_splits(DataConfig(train=str(file), columns={"text": "title"}), FIELDS)


@pytest.mark.parametrize("damage", ["cut", "gone", "unsaid"])
def test_a_damaged_cache_is_made_again(table, file, cache, monkeypatch, damage):
    calls = reads(monkeypatch)
    (folder,) = cache.iterdir()
    part = store.part(folder, 0)
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:100])
    elif damage == "gone":
        part.unlink()
    else:
        (folder / store.WHOLE).write_text("{")
    again = Source.of_files((str(file),)).table({}, FIELDS)
    assert len(calls) == 1 and list(again)[-1]["text"] == "row 2499"


def test_a_row_that_is_refused_leaves_nothing(tmp_path, cache):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"text": "a", "label": "x"}] * 1500 + [{"text": "", "label": "x"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"bad\.jsonl:1501: column 'text' is empty"):
            Source.of_files((str(file),)).table({}, FIELDS)
    assert not list(cache.rglob("*.arrow")) and not list(cache.rglob(store.WHOLE))


def test_a_cache_that_is_a_file_is_said(file, cache):
    cache.write_text("")
    with pytest.raises(UserError, match=r"the cache .* cannot be used: .*HF_DATASETS_CACHE"):
        Source.of_files((str(file),)).table({}, FIELDS)


def test_columns_that_come_late_are_missing_before(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x", "text_b": "c"}]
    file = write_jsonl(tmp_path / "late.jsonl", rows)
    with pytest.raises(UserError, match=r"late\.jsonl:1: column 'text_b' is empty"):
        Source.of_files((str(file),)).table({}, FIELDS)
    file = write_jsonl(tmp_path / "later.jsonl", [{"label": "x"}, {"text": "b", "label": "x"}])
    with pytest.raises(UserError, match=r"later\.jsonl:1: column 'text' is empty"):
        Source.of_files((str(file),)).table({}, FIELDS)
