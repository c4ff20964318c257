"""Rows: every kind of file yields the same rows with their places; every broken file is refused with file and line."""

from __future__ import annotations

import csv
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from compressft.data.hub import hub_rows
from compressft.data.rows import READERS, ROW_KEY, read_rows, sample_files
from compressft.errors import UserError

# Quotes, separators and line breaks inside fields, Unicode's line separators among them.
ROWS = [
    {"text": "plain", "label": "a"},
    {"text": 'with "quotes", commas\tand tabs', "label": "b"},
    {"text": "two\nlines", "label": "a"},
    {"text": "next\u0085line\u2028sep\x0bvertical\x0cform", "label": "grün"},
]


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path, rows, delimiter=",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def without_place(rows):
    return [{key: value for key, value in row.items() if key != ROW_KEY} for row in rows]


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def save(path, rows) -> None:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        table(path, rows, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(jsonl(rows), encoding="utf-8")


@pytest.mark.parametrize("suffix", [*(suffix for suffix in READERS if suffix != ".txt"), ".TSV", ".CSV", ".JSONL"])
def test_every_kind_of_file_yields_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    save(path, ROWS)
    rows = read_rows(path)
    assert without_place(rows) == ROWS
    assert len({row[ROW_KEY] for row in rows}) == len(ROWS)


def test_places_are_lines_of_the_file(write):
    path = write("rows.jsonl", '{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    assert [row[ROW_KEY] for row in read_rows(path)] == [f"{path}:{line}" for line in (1, 4, 5)]
    path = write("rows.csv", "a,b\n1,2\n3,4\n")
    assert [row[ROW_KEY] for row in read_rows(path)] == [f"{path}:{line}" for line in (2, 3)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    save(path, ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert without_place(read_rows(path)) == ROWS


def test_empty_cells_are_no_value(write):
    assert without_place(read_rows(write("rows.csv", "a,b\n,2\n"))) == [{"a": None, "b": "2"}]


def test_home_directory_is_expanded(write, monkeypatch):
    path = write("rows.csv", "a\n1\n")
    monkeypatch.setenv("HOME", str(path.parent))
    assert len(read_rows("~/rows.csv")) == 1


def test_missing_file_names_its_nearest_neighbour(write):
    path = write("train.jsonl", "{}\n")
    message = refusal(path.with_name("trian.jsonl"))
    assert "does not exist (did you mean 'train.jsonl'?)" in message
    assert "does not exist" in refusal(path.parent / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.xlsx", "x", ["unknown kind '.xlsx'", *READERS]),
        ("rows", "x", ["unknown kind ''", *READERS]),
        ("rows.jsonl", "", ["has no rows"]),
        ("rows.jsonl", "\n \n", ["has no rows"]),
        ("rows.csv", "", ["has no rows"]),
        ("rows.csv", "a,b\n", ["has no rows"]),
        ("rows.jsonl", b'{"a": 1}\n\n{"a": "\xe9"}\n', [":3: is not UTF-8 (byte 17)", "save the file as UTF-8"]),
        ("rows.csv", b"a\n1\n\xff\n", [":3: is not UTF-8"]),
        ("rows.jsonl", '{"a": 1}\n{"a": 2\n', [":2: is not JSON", "column 8"]),
        ("rows.json", '{"a": 1}\n"text"\n', [":2: wants one JSON object per line; got str"]),
        ("rows.json", '[{"a": 1}]\n', [":1: wants one JSON object per line; got list"]),
        (
            "rows.json",
            '[\n {"a": 1},\n {"a": 2}\n]\n',
            [":1: is JSON over several lines; wants one JSON object per line"],
        ),
        ("rows.json", '[{"a": 1},\n {"a": 2}]\n', [":1: is JSON over several lines"]),
        ("rows.json", '{\n "a": 1\n}\n{\n "a": 2\n}\n', [":1: is JSON over several lines"]),
        ("rows.jsonl", '{"a": "ok"}\n{"a": "a\\ud800b"}\n', [":2: column 'a' has '\\ud800', half of a surrogate pair"]),
        ("rows.jsonl", '{"a": ["\\uDC00"]}\n', [":1: column 'a' has '\\udc00'"]),
        ("rows.csv", "a,b\n1,2\n1,2,3\n", [":3: has another number of columns"]),
        ("rows.csv", "a,b\n1,2\n1\n", [":3: has another number of columns"]),
        ("rows.tsv", "a\tb\n1\t2\n1,2\n", [":3: has another number of columns"]),
        ("rows.parquet", "", ["is not Parquet"]),
        ("rows.parquet", "not parquet at all", ["is not Parquet"]),
    ],
)
def test_broken_file_is_refused_with_its_line(write, name, content, said):
    message = refusal(write(name, content))
    for part in said:
        assert part in message


def test_escaped_pairs_are_characters(write):
    path = write("rows.jsonl", json.dumps({"text": "\U0001f600"}) + "\n")
    assert "\\ud83d" in path.read_text()
    assert without_place(read_rows(path)) == [{"text": "\U0001f600"}]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "dir.jsonl").mkdir()
    message = refusal(tmp_path / "dir.jsonl")
    assert "is a folder; give a file" in message and "did you mean" not in message


@pytest.mark.parametrize("missing", [10, 40, 200])
def test_truncated_parquet_is_refused(tmp_path, missing):
    path = tmp_path / "rows.parquet"
    save(path, [{"text": str(i) * 9, "label": "a"} for i in range(200)])
    path.write_bytes(path.read_bytes()[missing:])
    assert "is not Parquet" in refusal(path)


def test_samples_are_complete_and_readable():
    paths = sample_files("banking77")
    assert set(paths) == {"train", "test"}
    train, test = (read_rows(paths[name]) for name in ("train", "test"))
    assert (len(train), len(test)) == (10_003, 3_080)
    assert {row["label"] for row in train} == {row["label"] for row in test}
    assert len({row["label"] for row in train}) == 77


def test_unknown_sample_names_the_nearest():
    with pytest.raises(UserError, match=r"'banking7' is not shipped; allowed: banking77.*did you mean 'banking77'"):
        sample_files("banking7")


@pytest.mark.skipif(os.environ.get("HF_HUB_OFFLINE") != "1", reason="needs HF_HUB_OFFLINE=1")
def test_hub_data_set_without_network_is_one_line():
    with pytest.raises(UserError) as caught:
        hub_rows("no-such-owner/no-such-data")
    message = str(caught.value)
    assert message.startswith("data.dataset: 'no-such-owner/no-such-data' could not be loaded: ")
    assert "\n" not in message


def test_hub_rows_name_class_labels_and_places(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    (tmp_path / "local").mkdir()
    table.to_parquet(tmp_path / "local" / "train.parquet")
    rows = {name: list(read()) for name, read in hub_rows(str(tmp_path / "local")).items()}
    assert without_place(rows["train"]) == [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    assert rows["train"][1][ROW_KEY].endswith("/train:2")


def test_hub_rows_name_tags(tmp_path):
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "tags": tags})
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=features)
    (tmp_path / "local").mkdir()
    table.to_parquet(tmp_path / "local" / "train.parquet")
    rows = {name: list(read()) for name, read in hub_rows(str(tmp_path / "local")).items()}
    assert without_place(rows["train"]) == [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}]


def test_a_text_file_is_a_row_for_each_paragraph(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text("First:\nSpeak.\n\n \nAll:\nSpeak, speak.\n", encoding="utf-8")
    assert read_rows(path) == [
        {"text": "First:\nSpeak.", ROW_KEY: f"{path}:1"},
        {"text": "All:\nSpeak, speak.", ROW_KEY: f"{path}:5"},
    ]


def test_hub_split_with_withheld_labels_is_left_out(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    (tmp_path / "local").mkdir()
    for split, labels in (("train", [1, 0]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "local" / f"{split}.parquet")
    assert set(hub_rows(str(tmp_path / "local"))) == {"train"}
