"""Read rows from files (JSON Lines, CSV, Parquet, text) and hub data sets; every complaint names file and line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from compressft.errors import UserError, nearest
from compressft.utils.foreign import foreign
from compressft.utils.hub import pinned
from compressft.utils.texts import parse_json, read_text

Row = dict[str, Any]
ROW_KEY = "__row__"


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file, each with its place ("file:line") under `ROW_KEY`.

    Raises:
        UserError: the file is missing, a folder, of an unknown kind, empty, not UTF-8, or a row is broken.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UserError(f"data: {str(path)!r} is a folder; give a file ({', '.join(READERS)})")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"data: file {str(path)!r} does not exist{nearest(path.name, beside)}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data: {path}: unknown kind {path.suffix!r}; allowed: {', '.join(READERS)}")
    rows = reader(path)
    if not rows:
        raise UserError(f"data: {path}: has no rows")
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows = []
    text = read_text(path, "data: ")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"data: {path}:{number}")
        except UserError:
            if line.strip() in ("[", "{") or _is_json(text):
                raise UserError(
                    f"data: {path}:{number}: is JSON over several lines; wants one JSON object per line"
                ) from None
            raise
        if not isinstance(row, dict):
            raise UserError(f"data: {path}:{number}: wants one JSON object per line; got {type(row).__name__}")
        _refuse_half_characters(row, line, f"{path}:{number}")
        rows.append(row | {ROW_KEY: f"{path}:{number}"})
    return rows


def _is_json(text: str) -> bool:
    try:
        parse_json(text, "")
    except UserError:
        return False
    return True


def _refuse_half_characters(row: Row, line: str, place: str) -> None:
    # Only an escape can be half of a surrogate pair, which no tokenizer takes.
    if "\\ud" not in line.lower():
        return
    for column, value in row.items():
        try:
            json.dumps({column: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(
                f"data: {place}: column {column!r} has {half!r}, half of a surrogate pair and no character; remove it"
            ) from None


def _csv(path: Path) -> list[Row]:
    delimiter, text = "\t" if path.suffix.lower() == ".tsv" else ",", read_text(path, "data: ")
    # A cell may be as long as it likes.
    csv.field_size_limit(2**31 - 1)
    # newline="": fields may hold line breaks of their own, also Unicode's. Strict: a lone quote would swallow rows.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines = re.split("\r\n|\n|\r", text) if '"' in text else []
    rows: list[Row] = []
    line = 1
    try:
        header = next(reader, [])
        _refuse_double(header, f"{path}:1")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise UserError(f"data: {path}:{reader.line_num}: has another number of columns than the header")
            spanned = lines[line - 1 : reader.line_num]
            if len(spanned) > 1 and all(part.count(delimiter) == len(header) - 1 for part in spanned):
                raise UserError(
                    f"data: {path}:{line}: a quote makes one row of {len(spanned)} lines that are rows by themselves; "
                    'double a quote that belongs to the text (""), and put its cell in quotes'
                )
            # An empty cell is CSV's only way to say that there is no value.
            row = {key: cell or None for key, cell in zip(header, cells, strict=False)}
            rows += [row | {ROW_KEY: f"{path}:{line}"}] if cells else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"data: {path}:{line}: is not CSV from this line on: {error}; "
            'write a cell that has quotes in quotes, each of its own doubled ("")'
        ) from None
    return rows


def _refuse_double(names: list[str], place: str) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"data: {place}: column {double[0]!r} is there twice; name them apart")


def _paragraphs(path: Path) -> list[Row]:
    """Running text: a row for each run of lines between blank ones."""
    rows: list[Row] = []
    inside = False
    for number, line in enumerate(read_text(path, "data: ").splitlines(), 1):
        if line.strip() and inside:
            rows[-1]["text"] += f"\n{line}"
        elif line.strip():
            rows.append({"text": line, ROW_KEY: f"{path}:{number}"})
        inside = bool(line.strip())
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    with foreign(f"data: {path}: is not Parquet"):
        table = pyarrow.parquet.read_table(path)
        rows = table.to_pylist()
    _refuse_double(table.column_names, str(path))
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            # Old writers do not say that their bytes are text.
            row[column] = _decoded(value, f"data: {path}:{number}: column {column!r}")
        row[ROW_KEY] = f"{path}:{number}"
    return rows


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_decoded(item, where) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: bytes that are not UTF-8 (byte {error.start}); write text") from None


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _paragraphs,
}


def sample_files(name: str) -> dict[str, str]:
    """Files of a data set shipped inside the package, by split."""
    root = Path(str(files("compressft"))) / "data" / "samples"
    known = sorted(p.name for p in root.iterdir() if p.is_dir())
    if name not in known:
        raise UserError(f"data.sample: {name!r} is not shipped; allowed: {', '.join(known)}{nearest(name, known)}")
    return {p.stem: str(p) for p in sorted((root / name).glob("*.jsonl"))}


def hub_rows(dataset: str, subset: str | None = None) -> dict[str, list[Row]]:
    """All splits of a hub data set; class labels become their names.

    Splits whose labels are withheld (-1) are left out.

    Raises:
        UserError: it cannot be loaded (no such id, or no network).
    """
    import datasets

    loaded = _load_hub(dataset, subset)
    result: dict[str, list[Row]] = {}
    for split in loaded:
        table = loaded[split]
        names = {key: f.names for key, f in table.features.items() if isinstance(f, datasets.ClassLabel)}
        lists = {key: getattr(f, "feature", None) for key, f in table.features.items()}
        tags = {key: f.names for key, f in lists.items() if isinstance(f, datasets.ClassLabel)}
        rows = [dict(row) for row in table]
        if rows and names and all(row[key] == -1 for row in rows for key in names):
            continue
        result[str(split)] = [
            row
            | {key: labels[row[key]] for key, labels in names.items()}
            | {key: [labels[i] for i in row[key]] for key, labels in tags.items()}
            | {ROW_KEY: f"{dataset}/{split}:{number}"}
            for number, row in enumerate(rows, 1)
        ]
    return result


def _load_hub(dataset: str, subset: str | None) -> Any:
    import datasets

    with foreign(f"data.dataset: {dataset!r} could not be loaded"):
        name, revision = pinned(dataset)
        return datasets.load_dataset(name, subset, revision=revision)


def hub_hash(dataset: str, subset: str | None = None) -> str:
    """Hash of what a hub data set's splits hold now, whatever the revision and the cache are that it comes from.

    Raises:
        UserError: as `hub_rows`.
    """
    loaded = _load_hub(dataset, subset)
    digest = hashlib.sha256()
    for split in sorted(loaded):
        digest.update(f"{split} {_class_names(loaded[split].features)}".encode())
        # Arrow's own values: nothing is decoded.
        for batch in loaded[split].with_format("arrow").iter(batch_size=1000):
            digest.update(repr(sorted(batch.to_pydict().items())).encode("utf-8", "surrogatepass"))
    return "sha256:" + digest.hexdigest()


def _class_names(features: Any) -> dict[str, Any]:
    """What the numbers of classes stand for, in columns of classes and of lists of classes."""
    return {name: getattr(getattr(f, "feature", f), "names", None) for name, f in features.items()}
