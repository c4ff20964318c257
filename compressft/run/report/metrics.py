"""Reads metrics.jsonl, the log of training and evaluation rows of one run."""

import contextlib
from pathlib import Path

from compressft.errors import UserError
from compressft.utils.texts import parse_json


def load_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a metrics.jsonl, in file order.

    A last line without its newline that does not parse was torn by a killed process and is dropped.
    Raises UserError with file and line for any other line that is not a JSON object.
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    rows = [_row(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if tail.strip():
        with contextlib.suppress(ValueError):
            rows.append(_row(tail, path, len(lines) + 1))
    return rows


def _row(line: bytes, path: str | Path, number: int) -> dict:
    where = f"{path}:{number}"
    try:
        row = parse_json(line.decode(), where)
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not UTF-8; remove or repair this line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: wants a JSON object, holds {type(row).__name__}; remove this line")
    return row
