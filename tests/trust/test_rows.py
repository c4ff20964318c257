"""Data of strangers: never fewer rows than the file has, nothing that is no text taken for text."""

import csv
import io
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressft.data.rows import ROW_KEY, read_rows
from compressft.errors import UserError
from compressft.tasks import TASKS
from tests.data.lists import canonical_rows
from tests.tiny_folder import write_jsonl

FIELDS = TASKS["sequence-classification"].fields
CELL = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


def plain(rows):
    return [{key: value for key, value in row.items() if key != ROW_KEY} for row in rows]


@settings(max_examples=200)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=6), st.sampled_from([",", "\t"]))
def test_what_csv_writes_is_read_back(tmp_path_factory, cells, delimiter):
    path = tmp_path_factory.mktemp("csv") / ("x.csv" if delimiter == "," else "x.tsv")
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *cells])
    path.write_bytes(text.getvalue().encode())
    try:
        found = plain(read_rows(path))
    except UserError as error:
        assert "rows by themselves" in str(error), "a cell whose lines could be rows"
    else:
        assert found == [{"a": a or None, "b": b or None} for a, b in cells]


@settings(max_examples=200)
@given(st.sets(st.integers(0, 39), min_size=1, max_size=3), st.booleans(), st.sampled_from([",", "\t"]), st.booleans())
def test_a_stray_quote_never_swallows_rows(tmp_path_factory, quoted, opens, delimiter, text_first):
    path = tmp_path_factory.mktemp("csv") / ("x.csv" if delimiter == "," else "x.tsv")
    columns = ("text", "label") if text_first else ("label", "text")
    lines = [delimiter.join(columns)]
    for i in range(40):
        text = f'"word {i}' if i in quoted and (opens or i == min(quoted)) else f"word {i}"
        text += '"' if i in quoted and not opens and i != min(quoted) else ""
        row = {"text": text, "label": "ab"[i % 2]}
        lines.append(delimiter.join(row[name] for name in columns))
    path.write_text("\n".join(lines) + "\n")
    try:
        rows = read_rows(path)
    except UserError as error:
        assert "\n" not in str(error) and f":{min(quoted) + 2}: " in str(error)
    else:
        assert len(rows) == 40


def test_long_cells_and_blank_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"' + "word " * 40_000 + '",a\n\nb,c\n')
    rows = read_rows(path)
    assert [len(row["text"]) for row in rows] == [200_000, 1]
    assert [row[ROW_KEY] for row in rows] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text("text,text\na,b\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(UserError, match=r"column 'text' is there twice|is not Parquet"):
        read_rows(path)


def test_a_key_twice_in_a_row_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": "x", "text": "b"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: key 'text' is given twice"):
        read_rows(path)


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("value", [None, math.nan, "", "  \t"])
def test_a_missing_value_is_missing_however_it_is_written(tmp_path, column, value):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": "b"}, {"text": "a", "label": "b", column: value}])
    with pytest.raises(UserError, match=rf"x\.jsonl:2: column '{column}' is empty"):
        canonical_rows(read_rows(path), {}, FIELDS)


@pytest.mark.parametrize("value", [3, 1.5, True, ["a", "b"], {"a": 1}])
def test_text_is_text(tmp_path, value):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": value, "label": "b"}])
    with pytest.raises(UserError, match=r"text wants (text; got|one text, this is a list)"):
        canonical_rows(read_rows(path), {}, FIELDS)


def test_a_whole_number_is_one_class_however_its_type_holds_it(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": label} for label in (1, 1.0, "1")])
    assert {row["label"] for row in canonical_rows(read_rows(path), {}, FIELDS)} == {"1"}
    path = write_jsonl(tmp_path / "y.jsonl", [{"text": "a", "label": 1.5}])
    with pytest.raises(UserError, match=r"label wants text or a whole number; got float 1\.5"):
        canonical_rows(read_rows(path), {}, FIELDS)


def test_bytes_of_parquet_are_text_or_refused(tmp_path):
    path = tmp_path / "x.parquet"
    table = {"text": pyarrow.array([b"caf\xc3\xa9"], pyarrow.binary()), "label": ["a"]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert read_rows(path)[0]["text"] == "café"
    table["text"] = pyarrow.array([b"\xff"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(UserError, match="column 'text': bytes that are not UTF-8"):
        read_rows(path)


@settings(max_examples=150)
@given(st.binary(max_size=60), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "txt"]))
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, raw, suffix):
    path = tmp_path_factory.mktemp("bytes") / f"x.{suffix}"
    path.write_bytes(raw)
    try:
        read_rows(path)
    except UserError as error:
        assert "\n" not in str(error).replace(repr("\n"), "")


def test_a_number_of_five_thousand_digits(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "label": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match="digits is too long"):
        read_rows(path)
    path.write_text(json.dumps({"text": "a", "score": 1}).replace("1}", "1" + "0" * 390 + "}"))
    with pytest.raises(UserError, match="is not a number"):
        canonical_rows(read_rows(path), {}, TASKS["regression"].fields)
