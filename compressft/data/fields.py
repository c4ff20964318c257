"""Which fields a task's rows have, and their types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressft.errors import UserError

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class Fields:
    """Fields of a task's rows, by whatever names it gives them; each is a column.

    `label` names the class field that splits are stratified by, `answer` what is asked. A field is a text, unless it is
    the label or among `numbers` or `words` (lists of strings).
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    label: str | None = None
    answer: str | None = None
    numbers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Required, then optional."""
        return self.required + self.optional

    @property
    def inputs(self) -> tuple[str, ...]:
        """All but the answer."""
        return tuple(name for name in self.all if name != self.answer)

    @classmethod
    def of_inputs(cls, fields: Fields) -> Fields:
        """The same rows without their answers."""
        required = tuple(name for name in fields.required if name != fields.answer)
        optional = tuple(name for name in fields.optional if name != fields.answer)
        return cls(required, optional, numbers=fields.numbers, words=fields.words)

    def schema(self, rows: Sequence[dict[str, Any]]) -> pyarrow.Schema:
        """The Arrow columns of canonical rows: texts, float64 of `numbers`, lists of texts of `words`."""
        import pyarrow

        def kind(name: str) -> pyarrow.DataType:
            if name in self.numbers:
                return pyarrow.float64()
            return pyarrow.list_(pyarrow.string()) if name in self.words else pyarrow.string()

        return pyarrow.schema([(name, kind(name)) for name in (rows[0] if rows else ())])

    def convert(self, name: str, value: Any, place: str) -> Any:
        """Bring a value to its field's type; UserError where it cannot be."""
        if name in self.numbers:
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not math.isfinite(number):
                text = repr(value)
                raise UserError(f"data: {place}: {name} {text[:60]}{'...' if len(text) > 60 else ''} is not a number")
            return number
        if name in self.words:
            if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
                raise UserError(f"data: {place}: {name} wants a list of strings; got {_shown(value)}")
            return value
        if name == self.label:
            return _class_name(name, value, place)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            raise UserError(
                f"data: {place}: {name} wants one text, this is a list of {len(value)}; write them into the file as "
                'one, words with blanks between them (" ".join), or train a tag a word with task: token-classification'
            )
        if not isinstance(value, str):
            raise UserError(f"data: {place}: {name} wants text; got {_shown(value)}")
        return value


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: null, or the number that is none, which others write for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class_name(name: str, value: Any, place: str) -> str:
    """A class by its name; a whole number names one too, the same as a fraction's type may hold it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value)
    raise UserError(f"data: {place}: {name} wants text or a whole number; got {_shown(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"
