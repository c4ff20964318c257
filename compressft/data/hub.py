"""Rows of data sets on the hub, through `datasets`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from compressft.data.rows import ROW_KEY, Row
from compressft.data.table import AT_ONCE
from compressft.utils.foreign import foreign
from compressft.utils.hub import pinned

if TYPE_CHECKING:
    from datasets import Dataset


def hub_rows(dataset: str, subset: str | None = None, stream: bool = False) -> dict[str, Callable[[], Iterator[Row]]]:
    """What gives the rows of each split of a hub data set; class labels become their names.

    Splits whose labels are withheld (-1) are left out.

    Args:
        stream: read them from the hub each time, and keep nothing.

    Raises:
        UserError: it cannot be loaded (no such id, or no network).
    """
    loaded = _load(dataset, subset, stream)
    return {
        str(split): lambda split=split: _rows(loaded[split], f"{dataset}/{split}")
        for split in loaded
        if stream or not _withheld(loaded[split])
    }


def hub_hash(dataset: str, subset: str | None = None) -> str:
    """Hash of what a hub data set's splits hold now, whatever the revision and the cache are that it comes from.

    Raises:
        UserError: as `hub_rows`.
    """
    loaded = _load(dataset, subset)
    digest = hashlib.sha256()
    for split in sorted(loaded):
        digest.update(f"{split} {_class_names(loaded[split].features)}".encode())
        # Arrow's own values: nothing is decoded.
        for batch in loaded[split].with_format("arrow").iter(batch_size=AT_ONCE):
            digest.update(repr(sorted(batch.to_pydict().items())).encode("utf-8", "surrogatepass"))
    return "sha256:" + digest.hexdigest()


def hub_state(dataset: str, subset: str | None = None) -> str:
    """Names what a hub data set is now, without reading it: its files and their revision.

    Raises:
        UserError: as `hub_rows`.
    """
    import datasets

    with foreign(f"data.dataset: {dataset!r} could not be loaded"):
        name, revision = pinned(dataset)
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
    return f"{builder.dataset_name} {builder.config.name} {builder.hash} {builder.info.version}"


def _load(dataset: str, subset: str | None, stream: bool = False) -> Any:
    import datasets

    with foreign(f"data.dataset: {dataset!r} could not be loaded"):
        name, revision = pinned(dataset)
        return datasets.load_dataset(name, subset, revision=revision, streaming=stream)


def _withheld(table: Dataset) -> bool:
    """Whether all labels are -1, as those of a contest's test rows are."""
    import datasets

    names = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    columns = table.with_format("numpy")
    return bool(names) and len(table) > 0 and all(bool(np.all(columns[name][:] == -1)) for name in names)


def _rows(table: Dataset, where: str) -> Iterator[Row]:
    import datasets

    # A stream of files without types has none.
    features = table.features or {}
    names = {key: f.names for key, f in features.items() if isinstance(f, datasets.ClassLabel)}
    lists = {key: getattr(f, "feature", None) for key, f in features.items()}
    tags = {key: f.names for key, f in lists.items() if isinstance(f, datasets.ClassLabel)}
    for number, row in enumerate(table, 1):
        yield (
            dict(row)
            | {key: labels[row[key]] for key, labels in names.items()}
            | {key: [labels[i] for i in row[key]] for key, labels in tags.items()}
            | {ROW_KEY: f"{where}:{number}"}
        )


def _class_names(features: Any) -> dict[str, Any]:
    """What the numbers of classes stand for, in columns of classes and of lists of classes."""
    return {name: getattr(getattr(f, "feature", f), "names", None) for name, f in features.items()}
