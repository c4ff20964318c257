"""Train, validation and test rows of a recipe: loaded, checked, stratified, seeded."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressft.data.augment import rewritten
from compressft.data.fields import Fields, is_missing
from compressft.data.rows import ROW_KEY, Row, hub_rows, read_rows, sample_files
from compressft.errors import UserError, nearest

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
    left out: which labels there are is theirs to say.
    """

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    unlabelled: list[Row] = field(default_factory=list)
    known: list[Row] = field(default_factory=list)

    @property
    def left_out(self) -> int:
        """Training rows as given that nothing is trained or validated on."""
        used = {row[ROW_KEY] for row in (*self.train, *self.validation)}
        return sum(row[ROW_KEY] not in used for row in self.known)

    @property
    def report_split(self) -> str:
        """The split that the report's quality figures are measured on."""
        return "test" if self.test else "validation"


def load_splits(config: DataConfig, fields: Fields, mask: str | None = None) -> Splits:
    """Load and check all splits of a recipe.

    Args:
        fields: the task's required and optional fields.
        mask: the tokenizer's mask token, for rewritten rows.

    Raises:
        UserError: a file, column, row or label is wrong.
    """
    raw = _raw(config)
    splits = {name: canonical_rows(rows, config.columns, fields) for name, rows in raw.items()}
    train, validation, test = splits["train"], splits.get("validation", []), splits.get("test", [])
    given = train
    if not validation:
        train, validation = carve(train, config.validation_fraction, fields.label, config.seed)
    if fields.label:
        known = {row[fields.label] for row in given}
        for row in (*validation, *test):
            if row[fields.label] not in known:
                raise UserError(f"data: {row[ROW_KEY]}: label {row[fields.label]!r} does not occur in train")
    if config.per_class and fields.label:
        train = balanced(train, config.per_class, fields.label, config.seed)
    if config.limit:
        train, validation, test = (_limited(rows, config.limit, config.seed) for rows in (train, validation, test))
    return Splits(train, validation, test, _unlabelled(config, fields, train, mask), given)


def _unlabelled(config: DataConfig, fields: Fields, train: list[Row], mask: str | None) -> list[Row]:
    """Rows of files without labels, then rewritten training rows."""
    rows: list[Row] = []
    files = source_files(config).get("unlabelled", ())
    if files:
        raw = [row for file in files for row in read_rows(file)]
        columns = {name: column for name, column in config.columns.items() if name in fields.inputs}
        rows = canonical_rows(raw, columns, Fields.of_inputs(fields))
        if config.limit:
            rows = _limited(rows, config.limit, config.seed)
    if config.augment is not None:
        rows += rewritten(train, fields.inputs, config.augment, mask, config.seed)
    return rows


def load_pool(config: DataConfig, fields: Fields, labelled: bool) -> list[Row]:
    """The training rows of a source as a pool to choose from.

    Args:
        labelled: with the answers that its rows have; else inputs alone, whatever other columns there are.

    Raises:
        UserError: a file, column or row is wrong.
    """
    wanted = fields if labelled else Fields.of_inputs(fields)
    columns = {name: column for name, column in config.columns.items() if name in wanted.all}
    rows = canonical_rows(_raw(config)["train"], columns, wanted)
    return _limited(rows, config.limit, config.seed) if config.limit else rows


def _raw(config: DataConfig) -> dict[str, list[Row]]:
    if config.dataset:
        rows = hub_rows(config.dataset, config.subset)
        if "train" not in rows:
            raise UserError(f"data.dataset: {config.dataset!r} has no split 'train'; splits: {', '.join(rows)}")
        return rows
    files = source_files(config)
    return {
        name: [row for file in files[name] for row in read_rows(file)]
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


def canonical_rows(rows: Sequence[Row], columns: dict[str, str], fields: Fields) -> list[Row]:
    """Rename columns to the task's field names and check that every row has what the task needs.

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
    present = [key for key in dict.fromkeys(key for row in rows for key in row) if key != ROW_KEY]
    mapping = {name: columns.get(name, name) for name in fields.all}
    for name in fields.all:
        if (name in fields.required or name in columns) and mapping[name] not in present:
            raise UserError(
                f"data: {rows[0][ROW_KEY]}: no column {mapping[name]!r} for {name!r}; columns: {', '.join(present)}"
                f"{_suggested(name, mapping[name], present)}; map it with data.columns.{name}"
            )
    used = {name: column for name, column in mapping.items() if column in present}
    result = []
    for row in rows:
        new = {ROW_KEY: row[ROW_KEY]}
        for name, column in used.items():
            value = row.get(column)
            if is_missing(value) or (isinstance(value, str) and not value.strip()):
                raise UserError(f"data: {row[ROW_KEY]}: column {column!r} is empty")
            new[name] = fields.convert(name, row[column], row[ROW_KEY])
        result.append(new)
    return result


def _suggested(name: str, column: str, present: Sequence[str]) -> str:
    """The column that is most likely meant; of a pair of texts it is the first for `text`."""
    if name == column == "text":
        for first, second in PAIRS:
            if first in present and second in present:
                return f" (did you mean {first!r}, with {second!r} for 'text_b'?)"
    return nearest(column, present)


def carve(rows: list[Row], fraction: float, label: str | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off a validation set, stratified by `label` where there is one; the order of rows is kept.

    Every class keeps at least one training row; a class with a single row gives none to validation.
    """
    generator = random.Random(seed)
    groups: dict[object, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row[label] if label else None].append(index)
    chosen: set[int] = set()
    for _, indices in sorted(groups.items(), key=lambda item: str(item[0])):
        generator.shuffle(indices)
        wanted = min(max(round(len(indices) * fraction), 1), len(indices) - 1)
        chosen.update(indices[:wanted])
    if not chosen:
        raise UserError("data: too few rows to carve a validation split out of train; give data.validation")
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def balanced(rows: list[Row], per_class: int, label: str, seed: int) -> list[Row]:
    """At most `per_class` rows of each class, drawn with the seed; the order of rows is kept."""
    generator = random.Random(seed)
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[row[label]].append(index)
    chosen: set[int] = set()
    for _, indices in sorted(groups.items()):
        generator.shuffle(indices)
        chosen.update(indices[:per_class])
    return [row for i, row in enumerate(rows) if i in chosen]


def _limited(rows: list[Row], limit: int, seed: int) -> list[Row]:
    if len(rows) <= limit:
        return rows
    chosen = set(random.Random(seed).sample(range(len(rows)), limit))
    return [row for i, row in enumerate(rows) if i in chosen]
