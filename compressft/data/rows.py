"""Rows of files (JSON Lines, CSV, Parquet, text), one after the other; every complaint names file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from compressft.data.table import AT_ONCE
from compressft.errors import UserError, nearest, reason
from compressft.utils.foreign import foreign
from compressft.utils.texts import not_utf8, parse_json, read_text

Row = dict[str, Any]
ROW_KEY = "__row__"


def iterate_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, each with its place ("file:line") under `ROW_KEY`; only one is held at a time.

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
    empty = True
    for row in reader(path):
        empty = False
        yield row
    if empty:
        raise UserError(f"data: {path}: has no rows")


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file; errors as `iterate_rows`."""
    return list(iterate_rows(path))


@contextmanager
def _opened(path: Path, mode: str = "rb", **options: Any) -> Iterator[IO[Any]]:
    try:
        with path.open(mode, **options) as file:
            yield file
    except UnicodeDecodeError:
        # Says where it is; what is whole comes from other bytes than were read a moment ago.
        read_text(path, "data: ")
        raise
    except OSError as error:
        raise UserError(f"data: {path}: cannot be read: {reason(error)}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a UTF-8 file, a byte order mark left out; lines end with a line feed."""
    before = 0
    with _opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.removesuffix(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"data: {path}:{number}: {not_utf8(before + error.start)}") from None
            before += len(raw)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = parse_json(line, f"data: {path}:{number}")
        except UserError:
            if line.strip() in ("[", "{") or _is_json(path):
                raise UserError(
                    f"data: {path}:{number}: is JSON over several lines; wants one JSON object per line"
                ) from None
            raise
        if not isinstance(row, dict):
            raise UserError(f"data: {path}:{number}: wants one JSON object per line; got {type(row).__name__}")
        _refuse_half_characters(row, line, f"{path}:{number}")
        yield row | {ROW_KEY: f"{path}:{number}"}


def _is_json(path: Path) -> bool:
    try:
        parse_json(read_text(path, "data: "), "")
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


class _Spanned:
    """The lines of a file as a CSV reader asks for them; those of the row that it reads are kept."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines = lines
        self.row: list[str] = []

    def __iter__(self) -> _Spanned:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.row.append(line.rstrip("\r\n"))
        return line


def _csv(path: Path) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # A cell may be as long as it likes.
    csv.field_size_limit(2**31 - 1)
    # newline="": fields may hold line breaks of their own, also Unicode's. Strict: a lone quote would swallow rows.
    with _opened(path, "r", encoding="utf-8-sig", newline="") as file:
        spanned = _Spanned(iter(file))
        reader = csv.reader(spanned, delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next(reader, [])
            _refuse_double(header, f"{path}:1")
            line = reader.line_num + 1
            spanned.row = []
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise UserError(f"data: {path}:{reader.line_num}: has another number of columns than the header")
                own = spanned.row
                if len(own) > 1 and all(part.count(delimiter) == len(header) - 1 for part in own):
                    raise UserError(
                        f"data: {path}:{line}: a quote makes one row of {len(own)} lines that are rows by themselves; "
                        'double a quote that belongs to the text (""), and put its cell in quotes'
                    )
                if cells:
                    # An empty cell is CSV's only way to say that there is no value.
                    row = {key: cell or None for key, cell in zip(header, cells, strict=False)}
                    yield row | {ROW_KEY: f"{path}:{line}"}
                line = reader.line_num + 1
                spanned.row = []
        except csv.Error as error:
            raise UserError(
                f"data: {path}:{line}: is not CSV from this line on: {error}; "
                'write a cell that has quotes in quotes, each of its own doubled ("")'
            ) from None


def _refuse_double(names: Sequence[str], place: str) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"data: {place}: column {double[0]!r} is there twice; name them apart")


def _paragraphs(path: Path) -> Iterator[Row]:
    """Running text: a row for each run of lines between blank ones."""
    row: Row | None = None
    number = 0
    for _, text in _lines(path):
        for line in text.splitlines() or [""]:
            number += 1
            if not line.strip():
                if row is not None:
                    yield row
                row = None
            elif row is None:
                row = {"text": line, ROW_KEY: f"{path}:{number}"}
            else:
                row["text"] += f"\n{line}"
    if row is not None:
        yield row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with foreign(f"data: {path}: is not Parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        batches = file.iter_batches(AT_ONCE)
    with file:
        _refuse_double(file.schema_arrow.names, str(path))
        number = 0
        while True:
            with foreign(f"data: {path}: is not Parquet"):
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            if batch is None:
                return
            for row in rows:
                number += 1
                # Old writers do not say that their bytes are text.
                place = f"{path}:{number}"
                found = {name: _decoded(cell, f"data: {place}: column {name!r}") for name, cell in row.items()}
                yield found | {ROW_KEY: place}


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_decoded(item, where) for item in value]
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: bytes that are not UTF-8 (byte {error.start}); write text") from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
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
