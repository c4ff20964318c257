"""Tables kept on the disk, made once: in parts, each of which is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressft.errors import UserError, trouble
from compressft.utils.version import __version__

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# Counts forms of what is written within one version of the package: another one is made again.
VERSION = 1
WHOLE = "whole.json"
# Lists of small numbers.
SMALL = ("attention_mask", "token_type_ids")
Records = list[dict[str, Any]]


def key_of(*parts: object) -> str:
    """A name for what is made of these, the same in every process."""
    text = json.dumps([VERSION, __version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cache_root() -> Path:
    """Where tables are kept: next to those of `datasets`, in HF_DATASETS_CACHE."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "compressft"


def kept(kind: str, key: str, make: Callable[[Path], int]) -> Dataset:
    """A table by its key; where there is none, `make(folder)` writes its parts and says how many there are.

    One process makes it, others that want it too wait. Parts that an interrupted one has written are there still.

    Raises:
        UserError: the cache cannot be written; and what `make` raises.
    """
    import datasets
    from filelock import FileLock

    folder = cache_root() / f"{kind}-{key[:32]}"
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            found = _read(folder)
            if found is None:
                parts = make(folder)
                write_text(folder / WHOLE, json.dumps({"parts": parts}))
                found = _read(folder)
    if found is None:
        raise UserError(f"data: {folder} was changed while it was written; run again")
    return datasets.concatenate_datasets(found) if len(found) > 1 else found[0]


def part(folder: Path, number: int) -> Path:
    """The file of a part."""
    return folder / f"part-{number:05d}.arrow"


def _read(folder: Path) -> list[Dataset] | None:
    """The parts of a finished table, memory-mapped; None where it is not there, or damaged (it is then removed)."""
    import datasets

    try:
        count = int(json.loads((folder / WHOLE).read_text())["parts"])
        return [datasets.Dataset.from_file(str(part(folder, number))) for number in range(count)]
    except FileNotFoundError:
        return None
    except Exception:
        # Whatever has happened to a cache, its rows can be made again.
        for file in folder.glob("*.arrow"):
            file.unlink(missing_ok=True)
        return None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f"data: the cache {folder.parent} cannot be used: {trouble(error) or error}; "
            "HF_DATASETS_CACHE names another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(text)
    staging.replace(path)


def write_part(path: Path, batches: Iterable[Records], schema: Callable[[Records], pyarrow.Schema]) -> int:
    """Write an Arrow stream, whole or not at all; gives the number of its rows.

    Args:
        batches: rows of the table, of which each batch is written before the next is asked for.
        schema: gives the columns, by the first batch that is not empty (`schema_of`).
    """
    import pyarrow

    waiting = (batch for batch in batches if batch)
    first = next(waiting, [])
    columns = schema(first)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    rows = 0
    try:
        with pyarrow.OSFile(str(staging), "wb") as file, pyarrow.ipc.new_stream(file, columns) as writer:
            for batch in chain([first], waiting):
                writer.write_table(pyarrow.Table.from_pylist(batch, schema=columns))
                rows += len(batch)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    return rows


def schema_of(rows: Records) -> pyarrow.Schema:
    """The columns of rows, their whole numbers in 32 bits; a list that is empty in all of them is one of numbers."""
    import pyarrow

    inferred = pyarrow.Table.from_pylist(rows).schema
    return pyarrow.schema(
        [
            field.with_type(pyarrow.list_(pyarrow.int8()) if field.name in SMALL else _narrow(field.type))
            for field in inferred
        ]
    )


def _narrow(kind: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow
    from pyarrow import types

    if types.is_int64(kind) or types.is_null(kind):
        return pyarrow.int32()
    if types.is_list(kind):
        return pyarrow.list_(_narrow(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_narrow(field.type)) for field in kind])
    return kind
