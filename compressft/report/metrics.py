"""Reads metrics.jsonl, the log of training and evaluation rows of one run."""

import contextlib
import json
from pathlib import Path


def load_metrics(path: str | Path) -> list[dict]:
    """Return the rows of a metrics.jsonl, in file order.

    A last line without its newline that does not parse was torn by a killed process and is dropped.
    Raises ValueError with file and line for any other line that is not a JSON object.
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    rows = [_row(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if tail.strip():
        with contextlib.suppress(ValueError):
            rows.append(_row(tail, path, len(lines) + 1))
    return rows


def _row(line: bytes, path: str | Path, number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:  # also covers UnicodeDecodeError
        raise ValueError(f"{path}, line {number}: not valid JSON ({error}); remove or repair this line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}; remove this line")
    return row
