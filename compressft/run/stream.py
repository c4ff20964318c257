"""Rows that come by and by: training reads them as it goes on, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

from torch.utils.data import IterableDataset

from compressft.data.rows import Row
from compressft.data.splits import STREAM_WINDOW, batched
from compressft.run.feed import LengthGroupedSampler
from compressft.tasks.corrupt import generator
from compressft.tasks.encode import lengths_of
from compressft.tasks.task import Feature, Task

T = TypeVar("T")


class Stream(IterableDataset[Feature]):
    """Features of rows that are read again and again, without end.

    Inside a window of `STREAM_WINDOW` rows the order is that of `LengthGroupedSampler`, by seed and window alone: a
    resumed run sees the same batches. It reads again what had been read.

    Args:
        rows: reads them, from the first on.
        batch_size: rows that go together: those of a step, of all processes.
    """

    def __init__(self, rows: Callable[[], Iterable[Row]], task: Task, batch_size: int, seed: int) -> None:
        self.rows = rows
        self.task = task
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[Feature]:
        epoch = number = 0
        while True:
            seen = 0
            for window in _windows(chain.from_iterable(self.task.encode_parts(batched(self.rows())))):
                order = LengthGroupedSampler(lengths_of(window, self.task), self.batch_size, self.seed).order(number)
                for i in order:
                    yield self._corrupted(window[i], epoch, seen + i)
                seen, number = seen + len(window), number + 1
            epoch += 1

    def _corrupted(self, feature: Feature, epoch: int, row: int) -> Feature:
        if not self.task.corrupts:
            return feature
        return self.task.corrupt(feature, generator(self.seed, epoch, row))


def _windows(items: Iterable[T]) -> Iterator[Sequence[T]]:
    items = iter(items)
    while window := list(islice(items, STREAM_WINDOW)):
        yield window
