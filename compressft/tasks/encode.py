"""Rows to features, kept on the disk: in parts, made by as many processes as there are cores."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressft.data.rows import Row
from compressft.data.splits import batched
from compressft.data.store import kept, key_of, part, schema_of, write_part
from compressft.data.table import Chain, Table, chained
from compressft.tasks.task import ENCODING, Feature, Task
from compressft.utils.machine import usable_cores
from compressft.utils.phases import phase, steps

# Rows of a part: what an interrupted encoding loses at most, and what one process does at a time.
ROWS = 10_000
# Seconds between two looks at what other processes have done.
PAUSE = 0.02
# What is kept of a feature besides: tokens as batches are padded, tokens of all its texts, whether its end may be lost.
LENGTH, TOKENS, FULL = "__length__", "__tokens__", "__full__"


@phase("loading")
def encoded(rows: Sequence[Row], task: Task, unlabelled: bool = False) -> Sequence[Feature]:
    """Features of rows. Those of a table are made once for a task and tokenizer, and read from the disk.

    Args:
        unlabelled: without labels that a loss would count.

    Raises:
        UserError: a row cannot be encoded, or the cache not be written.
    """
    if not len(rows):
        return []
    if not isinstance(rows, Table):
        return task.encode_unlabelled(rows) if unlabelled else task.encode(rows)
    key = key_of(rows.key, about(task), unlabelled)
    job = _Job(rows, task, unlabelled)
    return Table(kept("features", key, job.make), key, hidden=(LENGTH, TOKENS, FULL))


def about(task: Task) -> str:
    """Names what a task makes of a row: another one where it would make something else."""
    # Of a model's configuration features hold nothing, so that what training has encoded, export reads.
    settings = task.settings.model_dump_json()
    own = (task.type, settings, task.max_length, list(task.labels), _tokenizer_key(task.tokenizer))
    return key_of(*own, version("transformers"), version("tokenizers"))


def _tokenizer_key(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pieces = key_of(tokenizer.get_vocab(), str(tokenizer.init_kwargs))
    else:
        # How the last call cut and padded is no property of it.
        backend.no_truncation()
        backend.no_padding()
        pieces = hashlib.sha256(backend.to_str().encode()).hexdigest()
    special = str(tokenizer.special_tokens_map)
    return key_of(type(tokenizer).__name__, pieces, special, tokenizer.padding_side, tokenizer.truncation_side)


@dataclass(frozen=True)
class _Job:
    """What is to be encoded."""

    rows: Table
    task: Task
    unlabelled: bool

    def make(self, folder: Path) -> int:
        """Write the parts that are not there yet; gives their number."""
        if self.task.joins(self.rows):
            # What a feature holds depends on all rows before it.
            write_part(part(folder, 0), self._features(steps(list(_parts(len(self.rows))), ENCODING)), schema_of)
            return 1
        parts = list(_parts(len(self.rows)))
        missing = [number for number in range(len(parts)) if not part(folder, number).is_file()]
        if missing and missing[0] == 0:
            self.write(folder, missing.pop(0))
        workers = min(usable_cores(), len(missing))
        if workers > 1 and "fork" in multiprocessing.get_all_start_methods():
            _together(self, folder, missing, workers)
        else:
            for number in steps(missing, ENCODING):
                self.write(folder, number)
        return len(parts)

    def write(self, folder: Path, number: int) -> None:
        """Write a part; all have the columns of the first."""
        span = list(_parts(len(self.rows)))[number]
        schema = schema_of if number == 0 else lambda rows: _schema(part(folder, 0))
        write_part(part(folder, number), self._features([span]), schema)

    def _features(self, spans: Iterable[range]) -> Iterator[list[Feature]]:
        task = self.task
        rows = (self.rows[span.start : span.stop] for span in spans)
        for features in task.encode_parts(rows):
            if self.unlabelled:
                features = [task.without_label(feature) for feature in features]
            kept = ({**f, LENGTH: task.length(f), TOKENS: task.tokens(f), FULL: task.full(f)} for f in features)
            yield from batched(kept)


def _parts(rows: int) -> Iterator[range]:
    return (range(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


def _schema(path: Path) -> Any:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        return pyarrow.ipc.open_stream(file).schema


def _together(job: _Job, folder: Path, numbers: Sequence[int], workers: int) -> None:
    """Write parts in several processes; each has its own ones, and says what went wrong.

    They end by themselves where this process is killed.
    """
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    processes = [
        fork.Process(target=_work, args=(job, folder, numbers[i::workers], os.getpid(), send), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    # The last writer's end of the pipe is a child's.
    send.close()
    try:
        for number in steps(numbers, ENCODING):
            while not part(folder, number).is_file():
                if receive.poll(PAUSE):
                    raise receive.recv()
                if not any(process.is_alive() for process in processes) and not part(folder, number).is_file():
                    raise RuntimeError(f"encoding rows: a process ended ({[p.exitcode for p in processes]})")
    finally:
        for process in processes:
            process.terminate()
            process.join()
        receive.close()


def _work(job: _Job, folder: Path, numbers: Sequence[int], parent: int, send: Connection) -> None:
    # The parent decides what an interruption means. Nothing here starts threads of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        for number in numbers:
            if os.getppid() != parent:
                return
            job.write(folder, number)
    except BaseException as error:
        send.send(error)
        # What is in the pipe is read before the process ends.
        time.sleep(PAUSE)
        raise SystemExit(1) from None


def lengths_of(features: Sequence[Feature], task: Task) -> np.ndarray:
    """Tokens of each feature as batches are padded, (rows,)."""
    return _numbers(features, LENGTH, task.length)


def tokens_of(features: Sequence[Feature], task: Task) -> np.ndarray:
    """Tokens of each feature, of all its texts, (rows,)."""
    return _numbers(features, TOKENS, task.tokens)


def _numbers(features: Sequence[Feature], name: str, count: Any) -> np.ndarray:
    if isinstance(features, Table):
        return features.numbers(name)
    if isinstance(features, Chain):
        return np.concatenate([_numbers(one, name, count) for one in features.parts])
    return np.array([count(feature) for feature in features], dtype=np.int64)


def cut(splits: Sequence[Sequence[Row]], task: Task) -> str | None:
    """How many rows are longer than the task takes, in a sentence; None where none is."""
    rows: Sequence[Row] = chained(*splits)
    parts = (part for split in splits if len(split) for part in batched(_full(split, task)))
    return task.cut(parts, rows) if len(rows) else None


def _full(rows: Sequence[Row], task: Task) -> Iterable[Row]:
    """The rows whose end may be lost; all where features are not rows one by one."""
    if task.joins(rows):
        return rows
    features = encoded(rows, task)
    full = features.numbers(FULL) if isinstance(features, Table) else np.array([task.full(f) for f in features])
    return (rows[int(i)] for i in np.flatnonzero(full))


def longest_first(features: Sequence[Feature], task: Task) -> Sequence[Feature]:
    """Features by falling length; those of one length keep their order."""
    order = np.argsort(-lengths_of(features, task), kind="stable")
    return features.select(order) if isinstance(features, Table) else [features[int(i)] for i in order]
