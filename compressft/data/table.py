"""Rows in memory-mapped Arrow files: each is a dict while it is looked at, and none is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

T = TypeVar("T")
# Rows that are Python objects while all are gone through.
AT_ONCE = 1000


@dataclass(frozen=True, eq=False)
class Table(Sequence[dict[str, Any]]):
    """Some rows of an Arrow table, in an order.

    Attributes:
        stored: the table, of which `select` copies nothing.
        key: names its content; the same rows have the same one.
        order: which of its rows these are, (rows,) int64; None: all, as they stand.
        hidden: columns that are no part of a row.
    """

    stored: Dataset
    key: str
    order: np.ndarray | None = None
    hidden: tuple[str, ...] = ()

    @cached_property
    def _shown(self) -> Dataset:
        names = [name for name in self.stored.column_names if name not in self.hidden]
        return self.stored.select_columns(names).with_format("arrow")

    def __len__(self) -> int:
        return len(self.stored) if self.order is None else len(self.order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows at once: what a DataLoader asks for."""
        if not len(indices):
            return []
        if self.order is not None:
            indices = self.order[np.asarray(indices)].tolist()
        found: pyarrow.Table = self._shown[indices]  # type: ignore[assignment]
        return found.to_pylist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and _same(self, other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, indices: Sequence[int] | np.ndarray) -> Table:
        """These rows of it, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        order = chosen if self.order is None else self.order[chosen]
        key = hashlib.sha256(self.key.encode() + order.tobytes()).hexdigest()
        return Table(self.stored, key, order, self.hidden)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, (rows,)."""
        found = _column(self.stored, name).to_numpy()
        return found if self.order is None else found[self.order]

    def codes(self, name: str) -> tuple[list[str], np.ndarray]:
        """A column of words: those that occur in the table, and which of them each row has, (rows,) int32."""
        coded = _column(self.stored, name).combine_chunks().dictionary_encode()
        whole = coded.indices.to_numpy(zero_copy_only=False)
        return coded.dictionary.to_pylist(), whole if self.order is None else whole[self.order]


def _column(stored: Dataset, name: str) -> pyarrow.ChunkedArray:
    return stored.data.column(name)


def _same(rows: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(a == b for a, b in zip(rows, others, strict=True))


class Chain(Sequence[T]):
    """Several sequences, one after the other."""

    def __init__(self, *parts: Sequence[T]) -> None:
        self.parts = [part for part in parts if len(part)]
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[T]:
        """Several at once; those of one part are asked for together."""
        whose = np.searchsorted(self._ends, indices, side="right")
        found: list[Any] = [None] * len(indices)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(whose == number)
            start = int(self._ends[number]) - len(part)
            for place, item in zip(mine, taken(part, [int(indices[i]) - start for i in mine.tolist()]), strict=True):
                found[place] = item
        return found

    def __iter__(self) -> Iterator[T]:
        for part in self.parts:
            yield from part

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and _same(self, other)

    __hash__ = None  # type: ignore[assignment]


def taken(rows: Sequence[T], indices: Sequence[int]) -> list[T]:
    """Several items of a sequence, at once where it can do that."""
    together = getattr(rows, "__getitems__", None)
    return [rows[i] for i in indices] if together is None else together(indices)


def chained(*parts: Sequence[T]) -> Sequence[T]:
    """Sequences one after the other; a single one that is not empty is itself."""
    own = [part for part in parts if len(part)]
    return own[0] if len(own) == 1 else Chain(*own) if own else []


def distinct(rows: Sequence[dict[str, Any]], name: str) -> list[str]:
    """The words that a column has, or lists of words have in a column, sorted."""
    if isinstance(rows, Table):
        from pyarrow import types

        column = _column(rows.stored, name)
        if rows.order is not None:
            column = column.take(rows.order)
        if types.is_list(column.type):
            return sorted({word for chunk in column.chunks for word in chunk.flatten().unique().to_pylist()})
        return sorted(column.unique().to_pylist())
    cells = [row[name] for row in rows]
    return sorted({word for cell in cells for word in (cell if isinstance(cell, list) else [cell])})
