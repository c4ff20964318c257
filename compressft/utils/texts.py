"""Text and JSON of files that anyone may have written: whatever is wrong with one becomes one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from compressft.errors import UserError, reason

# Of nesting, and of digits of a whole number.
DEEPEST, DIGITS = 100, 400
# What JSON can hold.
JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


def read_text(path: str | Path, wants: str = "") -> str:
    """The text of a UTF-8 file, a byte order mark left out.

    Args:
        wants: begins the messages ("data: "), before the path.

    Raises:
        UserError: there is no such file, it may not be read, or it is not UTF-8; with the line.
    """
    try:
        raw = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{wants}{path}: cannot be read: {reason(error)}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{wants}{path}:{line}: {not_utf8(error.start)}") from None


def not_utf8(byte: int) -> str:
    """What is wrong with a file of another encoding, from this byte on, and the fix."""
    return f"is not UTF-8 (byte {byte}); save the file as UTF-8"


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: as `read_text`, and as `parse_json`.
    """
    return parse_json(read_text(path), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds; errors as `read_json`, and where it holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: wants a JSON object, holds {type(found).__name__}; restore the file")
    return found


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
        where: begins the messages, such as the file's name.

    Raises:
        UserError: it is not JSON, has a key twice, is nested deeper than `DEEPEST` or holds a number beyond all use.
    """
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: is not JSON: {error.msg} (line {error.lineno}, column {error.colno}); truncated or changed"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deep to be read") from None
    except _Wrong as error:
        raise UserError(f"{where}: {error}") from None
    if _deeper(found, DEEPEST):
        raise UserError(f"{where}: is nested deeper than {DEEPEST}")
    return found


class _Wrong(ValueError):
    """What a parser allows and we do not."""


def _once(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _Wrong(f"key {double!r} is given twice; keep one")
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise _Wrong(f"a number of {len(text):,} digits is too long")
    return int(text)


def _deeper(value: JSON, than: int) -> bool:
    level = [value]
    for _ in range(than):
        children = [item for one in level if isinstance(one, dict) for item in one.values()]
        level = children + [item for one in level if isinstance(one, list) for item in one]
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
    return True
