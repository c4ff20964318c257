"""Typed tasks: which fields a row has, how it becomes features and batches, which metric counts."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.data.table import distinct
from compressft.errors import UserError
from compressft.transform import without_labels
from compressft.utils.phases import steps
from compressft.utils.strict import Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An encoded row: token ids, `labels`, and what else its task keeps of it.
Feature: TypeAlias = dict[str, Any]
IGNORE = -100
# More tokens than any row has.
UNCUT = 2**30
ROWS_AT_ONCE = 1000
ENCODING = "encoding rows"


def at_once(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows in parts that a tokenizer takes in one call."""
    parts = [rows[i : i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]
    return steps(parts, ENCODING)


def share(number: int, total: int, what: str) -> str:
    """How many of them, to begin a sentence with: "3 of 40 rows (7.5%) are"."""
    return f"{number} of {total} {what} ({100 * number / total:.1f}%) are"


class TaskSettings(Strict):
    """What a recipe says of a task: its type, and for some tasks more. The type alone is written as a name."""

    type: str

    @model_serializer(mode="wrap")
    def _by_name(self, whole: SerializerFunctionWrapHandler) -> Any:
        return self.type if self == type(self)(type=self.type) else whole(self)


class Task(ABC):
    """Rows to features (dicts of lists), features to batches, outputs to a loss and a metric.

    It knows the tokenizer, the length, the labels, its settings, and the configuration of the model that is trained
    (None where rows alone are looked at).
    """

    type: ClassVar[str]
    fields: ClassVar[Fields]
    auto_class: ClassVar[str]
    # The one that counts; a task may choose it by its settings.
    metric: str
    greater_is_better: ClassVar[bool] = True
    # What a recipe may set besides the type.
    settings_class: ClassVar[type[TaskSettings]] = TaskSettings
    # Whether rows may lack their label while a teacher answers.
    teachable: ClassVar[bool] = False
    # Whether its outputs say how sure they are of a row's one label, by which rows can be chosen.
    chooses: ClassVar[bool] = False
    # Whether training changes each row again in every epoch (`corrupt`).
    corrupts: ClassVar[bool] = False
    # What features keep for that; no batch has it.
    hidden_keys: ClassVar[tuple[str, ...]] = ()
    # Whether a user reads one of several answers off the outputs, which a file must give as the model does.
    answers: ClassVar[bool] = True
    # Whether the file that ships goes on from the keys and values of earlier tokens.
    caches: ClassVar[bool] = False
    # Whether it is scored by what its model writes (`generate`) instead of by the logits.
    generates: ClassVar[bool] = False
    # The output of an ONNX file that answers; None where models of this task have no file.
    ships: ClassVar[str | None] = "logits"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str] = (),
        settings: TaskSettings | None = None,
        config: Any = None,
    ) -> None:
        # transformers says of a special token that it may be anything.
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        self.labels = tuple(labels)
        self.settings = settings or self.settings_class(type=self.type)
        self.config = config
        self.label_ids = {name: i for i, name in enumerate(self.labels)}

    def remade(self, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None) -> Task:
        """The same task with another tokenizer or length."""
        own = self.tokenizer if tokenizer is None else tokenizer
        return type(self)(own, max_length or self.max_length, self.labels, self.settings, self.config)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What a head belongs to: the task's type and its labels, whatever their order."""
        return self.type, tuple(sorted(self.labels))

    @classmethod
    def labels_of(cls, rows: Sequence[Row]) -> tuple[str, ...]:
        """The label names that occur, sorted."""
        return tuple(distinct(rows, cls.fields.label)) if cls.fields.label else ()

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that give the model its head."""
        return {
            "pad_token_id": self.tokenizer.pad_token_id,
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self.label_ids),
        }

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        """Features of rows: token ids without padding, and `labels` where rows have them."""

    def joins(self, rows: Sequence[Row]) -> bool:
        """Whether texts are joined: features then go on from one row to the next."""
        return False

    def encode_parts(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        """The same as `encode` of all parts' rows, a part at a time."""
        return (self.encode(part) for part in parts)

    def corrupt(self, feature: Feature, draws: random.Random) -> Feature:
        """The row as training sees it once; all draws come from `draws`."""
        return feature

    def predictions(self, logits: Tensor) -> Tensor:
        """What a user would read off the logits (B, ...); compared for label agreement."""
        return logits.argmax(-1)

    def inputs(self, rows: Sequence[Feature]) -> dict[str, Tensor]:
        """What a model is asked about rows: a padded batch without what it should answer."""
        return self.collate([without_labels(row) for row in rows])

    def asked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What of a padded batch a model is given where its loss is wanted."""
        return batch

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, a scalar: as the model's own head computes it, unless a task has another."""
        return outputs["loss"]

    def generate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What a model writes for a batch, ids (B, U); asked where the task `generates`."""
        raise NotImplementedError

    def by_row(self, logits: Tensor, rows: int) -> Tensor:
        """A batch's outputs as (rows, ...)."""
        return logits

    def own(self, answer: Any, row: Feature) -> Any:
        """One row's outputs without those of its batch's paddings: of (T, C) its own tokens."""
        return answer[: len(row["input_ids"])] if answer.ndim == 2 else answer

    def length(self, row: Feature) -> int:
        """Tokens of a row (a feature) as batches are padded: rows of one length go together."""
        return len(row["input_ids"])

    def tokens(self, row: Feature) -> int:
        """Tokens that a row of its length takes in a batch, of all its texts."""
        return self.length(row)

    def pieces(self, row: Feature) -> Sequence[int]:
        """All token ids that a row (a feature) has, wherever they stand."""
        return row["input_ids"]

    def truth(self, rows: Sequence[Feature]) -> Any:
        """What rows should be answered with, as `evidence` and `metrics` compare it: the labels of a padded batch."""
        return self.collate([dict(row) for row in rows])["labels"]

    def evidence(self, answers: Tensor, truth: Any) -> Tensor:
        """What the metrics need of each row of a batch, (B, ...): all that is kept of its outputs.

        Args:
            answers: logits (B, C) or (B, T, C), float; ids (B, U) of a task that `generates`.
            truth: of the same rows.
        """
        return self.predictions(answers)

    @abstractmethod
    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        """Metrics of all rows' evidence (rows, ...) and truth; the key `self.metric` is the one that counts."""

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Pad on the right to the longest row: int64 tensors (B, T), `labels` as the task needs them."""
        width = max(len(f["input_ids"]) for f in features)
        batch: dict[str, Tensor] = {}
        for key in features[0]:
            if key in self.hidden_keys:
                continue
            if key == "labels":
                batch[key] = self._collate_labels([f[key] for f in features], width)
                continue
            fill = self.tokenizer.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features])
        return batch

    def full(self, row: Feature) -> bool:
        """Whether a row (a feature) is as long as it may be, and so may have lost its end."""
        return self.length(row) >= self.max_length

    def cut(self, parts: Iterable[Sequence[Row]], everything: Sequence[Row]) -> str | None:
        """How many rows are longer than `max_length` and lose their end, in a sentence; None where none does.

        Args:
            parts: those that may be longer (`full`), some at a time.
            everything: all rows.
        """
        uncut = self.remade(max_length=UNCUT)
        number = sum(self.length(feature) > self.max_length for rows in parts for feature in uncut.encode(rows))
        if not number:
            return None
        return f"{share(number, len(everything), 'rows')} longer than data.max_length {self.max_length} and are cut"

    def encode_unlabelled(self, rows: Sequence[Row]) -> list[Feature]:
        """Features of rows without labels, whose `labels` no loss counts."""
        return [self.without_label(feature) for feature in self.encode(rows)] if rows else []

    def without_label(self, feature: Feature) -> Feature:
        """The same row with `labels` that no loss counts."""
        return {**feature, "labels": self._no_label(feature)}

    def _no_label(self, feature: Feature) -> Any:
        return IGNORE

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        """(B,), or (B, T) of labels for every token, paddings ignored."""
        rows = [row + [IGNORE] * (width - len(row)) if isinstance(row, list) else row for row in labels]
        return torch.tensor(rows)

    def refuse_other_labels(self, rows: Sequence[Row]) -> None:
        """UserError where rows have a label that training does not know."""
        name = self.fields.label
        if name is None or not len(rows) or name not in rows[0] or set(distinct(rows, name)) <= set(self.labels):
            return
        for row in rows:
            self._label(row, name, row[name])

    def _label(self, row: Row, name: str, value: str) -> int:
        if value not in self.label_ids:
            raise UserError(f"data: {row[ROW_KEY]}: {name} {value!r} does not occur in train")
        return self.label_ids[value]

    def _tokenise(self, rows: Sequence[Row]) -> list[Feature]:
        found: list[Feature] = []
        for some in at_once(rows):
            pairs = [row["text_b"] for row in some] if "text_b" in some[0] else None
            encoded = self.tokenizer(
                [row["text"] for row in some], pairs, truncation=True, max_length=self.max_length, padding=False
            )
            found += [self._feature(encoded, i, row) for i, row in enumerate(some)]
        return found

    def _feature(self, encoded: Any, i: int, row: Row) -> dict[str, list[int]]:
        """Row `i` of a tokenizer's output; UserError where it has no token, as an empty text has for most decoders."""
        feature = {key: list(encoded[key][i]) for key in encoded}
        if not feature["input_ids"]:
            raise UserError(
                f"data: {row[ROW_KEY]}: the text has no token, and this tokenizer adds none; remove the row"
            )
        return feature
