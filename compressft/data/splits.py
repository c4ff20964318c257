"""Train, validation and test rows of a recipe: loaded, checked, stratified, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressft.data.augment import rewritten
from compressft.data.fields import Fields, is_missing
from compressft.data.rows import ROW_KEY, Row, iterate_rows, sample_files
from compressft.data.store import kept, key_of, part, write_part
from compressft.data.table import AT_ONCE, Table, chained
from compressft.errors import UserError, nearest
from compressft.utils.files import file_hash, file_state

if TYPE_CHECKING:
    from compressft.data.source import DataConfig

# What others call the two texts of a pair.
STEMS = ("text", "text_", "sentence", "sentence_", "question", "question_", "sent", "s", "q", "string", "input_")
PAIRS = (
    *((stem + one, stem + two) for stem in STEMS for one, two in (("1", "2"), ("a", "b"), ("A", "B"))),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("query", "passage"),
    ("question", "passage"),
)


@dataclass(frozen=True)
class Splits:
    """Rows with canonical keys (`text`, `label`, ...). `test` may be empty: the report then uses validation.

    `unlabelled` rows have inputs alone. `known` are the training rows as they were given, before any were set aside or
    left out: which labels there are is theirs to say. `left_out` counts those that nothing is trained or validated on.
    Where training reads a `stream`, `train` is its beginning.
    """

    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    unlabelled: Sequence[Row] = field(default_factory=list)
    known: Sequence[Row] = field(default_factory=list)
    left_out: int = 0
    stream: Callable[[], Iterator[Row]] | None = None

    @property
    def report_split(self) -> str:
        """The split that the report's quality figures are measured on."""
        return "test" if self.test else "validation"


# Rows of a stream that are shuffled together, and that decisions by the rows are made by.
STREAM_WINDOW = 10_000


def load_splits(config: DataConfig, fields: Fields, mask: str | None = None) -> Splits:
    """Load and check all splits of a recipe; what is read once is kept for the next time.

    Args:
        fields: the task's required and optional fields.
        mask: the tokenizer's mask token, for rewritten rows.

    Raises:
        UserError: a file, column, row or label is wrong.
    """
    if config.streaming:
        return _streamed(config, fields)
    splits = {name: source.table(config.columns, fields) for name, source in _sources(config).items()}
    train, validation, test = splits["train"], splits.get("validation"), splits.get("test")
    given, carved = train, validation is None
    if validation is None:
        kept_back, chosen = carve(_classes(train, fields.label), config.validation_fraction, config.seed)
        train, validation = train.select(kept_back), train.select(chosen)
    for other in (validation, test):
        if fields.label and other is not None:
            _refuse_other_labels(other, given, fields.label)
    if config.per_class and fields.label:
        train = train.select(balanced(_classes(train, fields.label), config.per_class, config.seed))
    if config.limit:
        train, validation = (_limited(rows, config.limit, config.seed) for rows in (train, validation))
        test = None if test is None else _limited(test, config.limit, config.seed)
    unlabelled = _unlabelled(config, fields, train, mask)
    left_out = len(given) - len(train) - (len(validation) if carved else 0)
    return Splits(train, validation, [] if test is None else test, unlabelled, given, left_out)


def _streamed(config: DataConfig, fields: Fields) -> Splits:
    """Splits of which training rows are not kept."""
    sources = _sources(config)
    if "validation" not in sources:
        raise UserError("data.streaming: there is no split 'validation', and none can be set aside; give one")
    train = sources.pop("train")
    whole = train if config.limit is None else train.first(config.limit)
    tables = {name: source.table(config.columns, fields) for name, source in sources.items()}
    first = whole.first(STREAM_WINDOW).table(config.columns, fields)
    validation, test = tables["validation"], tables.get("test", [])
    for other in (test, first):
        if fields.label and isinstance(other, Table):
            _refuse_other_labels(other, validation, fields.label, "validation")

    def stream() -> Iterator[Row]:
        return canonical(whole.rows, config.columns, fields)

    return Splits(first, validation, test, known=validation, stream=stream)


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        about: names what is read: the same one gives the same rows.
        rows: reads them, from the first on.
    """

    about: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]

    def first(self, rows: int) -> Source:
        """Its beginning."""
        return Source((*self.about, str(rows)), lambda: islice(self.rows(), rows))

    @classmethod
    def of_files(cls, files: Sequence[str], hashed: bool = True) -> Source:
        """One file after the other.

        Args:
            hashed: read them whole to know whether they are the same; else by size and time of change.
        """
        return cls(
            tuple(f"{file} {_digest(file, hashed)}" for file in files),
            lambda: (row for one in files for row in iterate_rows(one)),
        )

    def table(self, columns: dict[str, str], fields: Fields) -> Table:
        """The rows by the task's names, checked; errors as `canonical`."""
        key = key_of(list(self.about), columns, str(fields))

        def make(folder: Path) -> int:
            write_part(part(folder, 0), batched(canonical(self.rows, columns, fields)), fields.schema)
            return 1

        return Table(kept("rows", key, make), key)


def _digest(file: str, hashed: bool) -> str:
    path = Path(file).expanduser()
    # Whoever reads it says why it cannot be read.
    return (file_hash if hashed else file_state)(path) if path.is_file() else ""


def batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows, as many at a time as are Python objects at once."""
    rows = iter(rows)
    while batch := list(islice(rows, AT_ONCE)):
        yield batch


def _classes(table: Table, label: str | None) -> tuple[list[str], np.ndarray]:
    """The classes that occur and which one each row has; without labels all are of one."""
    return table.codes(label) if label else ([""], np.zeros(len(table), dtype=np.int32))


def _refuse_other_labels(table: Table, given: Table, label: str, where: str = "train") -> None:
    known = set(given.codes(label)[0])
    names, codes = table.codes(label)
    other = [code for code, name in enumerate(names) if name not in known]
    if other:
        row = table[int(np.flatnonzero(np.isin(codes, other))[0])]
        raise UserError(f"data: {row[ROW_KEY]}: label {row[label]!r} does not occur in {where}")


def _unlabelled(config: DataConfig, fields: Fields, train: Table, mask: str | None) -> Sequence[Row]:
    """Rows of files without labels, then rewritten training rows."""
    found: list[Sequence[Row]] = []
    files = source_files(config).get("unlabelled", ())
    if files:
        columns = {name: column for name, column in config.columns.items() if name in fields.inputs}
        rows = Source.of_files(files).table(columns, Fields.of_inputs(fields))
        found.append(_limited(rows, config.limit, config.seed) if config.limit else rows)
    if config.augment is not None:
        found.append(_rewritten(config, fields, train, mask))
    return chained(*found)


def _rewritten(config: DataConfig, fields: Fields, train: Table, mask: str | None) -> Table:
    augment = config.augment
    assert augment is not None
    key = key_of(train.key, list(fields.inputs), augment.model_dump_json(), mask, config.seed)

    def make(folder: Path) -> int:
        write_part(part(folder, 0), batched(rewritten(train, fields.inputs, augment, mask, config.seed)), fields.schema)
        return 1

    return Table(kept("rewritten", key, make), key)


def load_pool(config: DataConfig, fields: Fields, labelled: bool) -> Table:
    """The training rows of a source as a pool to choose from.

    Args:
        labelled: with the answers that its rows have; else inputs alone, whatever other columns there are.

    Raises:
        UserError: a file, column or row is wrong.
    """
    if config.streaming:
        raise UserError("data.streaming: a selection compares all rows of its pool; remove streaming")
    wanted = fields if labelled else Fields.of_inputs(fields)
    columns = {name: column for name, column in config.columns.items() if name in wanted.all}
    rows = _sources(config)["train"].table(columns, wanted)
    return _limited(rows, config.limit, config.seed) if config.limit else rows


def _sources(config: DataConfig) -> dict[str, Source]:
    if config.dataset:
        from compressft.data.hub import hub_hash, hub_rows, hub_state

        name, subset, stream = config.dataset, config.subset, config.streaming
        rows = hub_rows(name, subset, stream)
        digest = hub_state(name, subset) if stream else hub_hash(name, subset)
        if "train" not in rows:
            raise UserError(f"data.dataset: {config.dataset!r} has no split 'train'; splits: {', '.join(rows)}")
        return {name: Source((digest, config.dataset, name), read) for name, read in rows.items()}
    files = source_files(config)
    return {
        name: Source.of_files(files[name], hashed=not (config.streaming and name == "train"))
        for name in ("train", "validation", "test")
        if name in files
    }


def source_files(config: DataConfig) -> dict[str, tuple[str, ...]]:
    """The files that a recipe's rows are read from, by split; those of a hub data set are left out.

    Raises:
        UserError: an unknown sample.
    """
    found: dict[str, Any] = dict(sample_files(config.sample)) if config.sample else {}
    # A data set on the hub has its own splits.
    labelled = () if config.dataset else ("train", "validation", "test")
    for name in (*labelled, "unlabelled"):
        if getattr(config, name):
            found[name] = getattr(config, name)
    return {name: files if isinstance(files, tuple) else (files,) for name, files in found.items()}


def canonical(rows: Callable[[], Iterable[Row]], columns: dict[str, str], fields: Fields) -> Iterator[Row]:
    """Rename columns to the task's field names and check that every row has what the task needs.

    Args:
        rows: gives the rows, from the first on; it is called again where a column that is not there is complained of.

    Raises:
        UserError: an unknown field in the mapping, a column that is not there (with the nearest match), or a value
        of the wrong type (with its place).
    """
    unknown = set(columns) - set(fields.all)
    if unknown:
        name = sorted(unknown)[0]
        raise UserError(
            f"data.columns: {name!r} is no field of this task; "
            f"allowed: {', '.join(fields.all)}{nearest(name, fields.all)}"
        )
    mapping = {name: columns.get(name, name) for name in fields.all}
    needed = [name for name in fields.all if name in fields.required or name in columns]
    used: dict[str, str] | None = None
    first = ""
    for row in rows():
        if used is None:
            first = row[ROW_KEY]
            for name in needed:
                if mapping[name] not in row:
                    _refuse_missing(rows(), name, mapping[name])
            used = {name: column for name, column in mapping.items() if column in row}
        for name, column in mapping.items():
            if name not in used and column in row:
                # A column that some rows have, all must have.
                raise UserError(f"data: {first}: column {column!r} is empty")
        new: Row = {ROW_KEY: row[ROW_KEY]}
        for name, column in used.items():
            value = row.get(column)
            if is_missing(value) or (isinstance(value, str) and not value.strip()):
                raise UserError(f"data: {row[ROW_KEY]}: column {column!r} is empty")
            new[name] = fields.convert(name, value, row[ROW_KEY])
        yield new


def _refuse_missing(rows: Iterable[Row], name: str, column: str) -> None:
    """Say that the first row lacks a column, or that all do."""
    present: dict[str, None] = {}
    first = ""
    for row in rows:
        first = first or row[ROW_KEY]
        present |= dict.fromkeys(key for key in row if key != ROW_KEY)
    if column in present:
        raise UserError(f"data: {first}: column {column!r} is empty")
    raise UserError(
        f"data: {first}: no column {column!r} for {name!r}; columns: {', '.join(present)}"
        f"{_suggested(name, column, list(present))}; map it with data.columns.{name}"
    )


def _suggested(name: str, column: str, present: Sequence[str]) -> str:
    """The column that is most likely meant; of a pair of texts it is the first for `text`."""
    if name == column == "text":
        for first, second in PAIRS:
            if first in present and second in present:
                return f" (did you mean {first!r}, with {second!r} for 'text_b'?)"
    return nearest(column, present)


Classes = tuple[list[str], np.ndarray]


def _by_class(classes: Classes) -> Iterator[list[int]]:
    """The rows of each class, in the order of the classes' names."""
    names, codes = classes
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(names)))
    for code in sorted(range(len(names)), key=names.__getitem__):
        start = int(ends[code - 1]) if code else 0
        if start < ends[code]:
            yield order[start : ends[code]].tolist()


def carve(classes: Classes, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows stay for training and which are split off for validation, stratified; the order of rows is kept.

    Every class keeps at least one training row; a class with a single row gives none to validation.

    Args:
        classes: names, and the class of each row (rows,).
    """
    generator = random.Random(seed)
    chosen = np.zeros(len(classes[1]), dtype=bool)
    for indices in _by_class(classes):
        generator.shuffle(indices)
        wanted = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
        chosen[indices[:wanted]] = True
    if not chosen.any():
        raise UserError("data: too few rows to carve a validation split out of train; give data.validation")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def balanced(classes: Classes, per_class: int, seed: int) -> np.ndarray:
    """Which rows are kept: at most `per_class` of each class, drawn with the seed; the order of rows is kept."""
    generator = random.Random(seed)
    chosen = np.zeros(len(classes[1]), dtype=bool)
    for indices in _by_class(classes):
        generator.shuffle(indices)
        chosen[indices[:per_class]] = True
    return np.flatnonzero(chosen)


def _limited(rows: Table, limit: int, seed: int) -> Table:
    if len(rows) <= limit:
        return rows
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))
