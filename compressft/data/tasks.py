"""Typed tasks: which fields a row has, how it becomes features and batches, which metric counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.data.words import wants_blanks, with_blanks
from compressft.errors import UserError
from compressft.phases import phase, steps

IGNORE = -100
# More tokens than any row has.
UNCUT = 2**30
ROWS_AT_ONCE = 1000
ENCODING = "encoding rows"


def _at_once(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows in parts that a tokenizer takes in one call."""
    parts = [rows[i : i + ROWS_AT_ONCE] for i in range(0, len(rows), ROWS_AT_ONCE)]
    return steps(parts, ENCODING)


class Task(ABC):
    """Rows to features (dicts of lists), features to batches, outputs to a metric. Knows tokenizer, labels, length."""

    type: ClassVar[str]
    fields: ClassVar[Fields]
    auto_class: ClassVar[str]
    metric: ClassVar[str]
    greater_is_better: ClassVar[bool] = True

    def __init__(self, tokenizer: Any, max_length: int, labels: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.labels = tuple(labels)
        self.label_ids = {name: i for i, name in enumerate(self.labels)}

    @classmethod
    def labels_of(cls, rows: Sequence[Row]) -> tuple[str, ...]:
        """The label names that occur, sorted."""
        return tuple(sorted({row["label"] for row in rows})) if cls.fields.label else ()

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` that give the model its head."""
        return {
            "pad_token_id": self.tokenizer.pad_token_id,
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self.label_ids),
        }

    @abstractmethod
    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Features of rows: token ids without padding, and `labels` where rows have them."""

    def predictions(self, logits: Tensor) -> Tensor:
        """What a user would read off the logits (B, ...); compared for label agreement."""
        return logits.argmax(-1)

    def evidence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the metrics need of each row of a batch, (B, ...): all that is kept of its logits.

        Args:
            logits: (B, C) or (B, T, C), float.
            labels: as `collate` makes them.
        """
        return self.predictions(logits)

    @abstractmethod
    def metrics(self, evidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics of all rows' evidence (rows, ...) against labels; the key `self.metric` is the one that counts."""

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad on the right to the longest row: int64 tensors (B, T), `labels` as the task needs them."""
        width = max(len(f["input_ids"]) for f in features)
        batch: dict[str, Tensor] = {}
        for key in features[0]:
            if key == "labels":
                batch[key] = self._collate_labels([f[key] for f in features], width)
                continue
            fill = self.tokenizer.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features])
        return batch

    @phase("loading")
    def cut(self, rows: Sequence[Row]) -> str | None:
        """How many rows are longer than `max_length` and lose their end, in a sentence; None where none does."""
        whole = type(self)(self.tokenizer, UNCUT, self.labels).encode(rows) if rows else []
        number = sum(len(feature["input_ids"]) > self.max_length for feature in whole)
        if not number:
            return None
        share = f"{100 * number / len(rows):.1f}"
        return f"{number} of {len(rows)} rows ({share}%) are longer than data.max_length {self.max_length} and are cut"

    def encode_unlabelled(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Features of rows without labels, whose `labels` no loss counts."""
        return [{**feature, "labels": self._no_label(feature)} for feature in self.encode(rows)] if rows else []

    def _no_label(self, feature: dict[str, Any]) -> Any:
        return IGNORE

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        return torch.tensor(labels)

    def _label(self, row: Row, name: str, value: str) -> int:
        if value not in self.label_ids:
            raise UserError(f"data: {row[ROW_KEY]}: {name} {value!r} does not occur in train")
        return self.label_ids[value]

    def _tokenise(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for some in _at_once(rows):
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


class SequenceClassification(Task):
    """One label per text or pair of texts; accuracy."""

    type = "sequence-classification"
    fields = Fields(("text", "label"), ("text_b",), label="label", answer="label")
    auto_class = "AutoModelForSequenceClassification"
    metric = "accuracy"

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        features = self._tokenise(rows)
        for feature, row in zip(features, rows, strict=True):
            if "label" in row:
                feature["labels"] = self._label(row, "label", row["label"])
        return features

    def metrics(self, evidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(labels, evidence)),
            "f1_macro": float(f1_score(labels, evidence, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        }


class Regression(Task):
    """One number per text or pair of texts; Pearson correlation (0 where the predictions are constant)."""

    type = "regression"
    fields = Fields(("text", "score"), ("text_b",), answer="score")
    auto_class = "AutoModelForSequenceClassification"
    metric = "pearson"

    def model_arguments(self) -> dict[str, Any]:
        return {"pad_token_id": self.tokenizer.pad_token_id, "num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        features = self._tokenise(rows)
        for feature, row in zip(features, rows, strict=True):
            if "score" in row:
                feature["labels"] = row["score"]
        return features

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def predictions(self, logits: Tensor) -> Tensor:
        return logits.reshape(len(logits)).double()

    def metrics(self, evidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        predicted = evidence
        if np.ptp(predicted) == 0 or np.ptp(labels) == 0 or len(labels) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        return {"pearson": float(pearsonr(predicted, labels)[0]), "spearman": float(spearmanr(predicted, labels)[0])}  # type: ignore[arg-type]


class TokenClassification(Task):
    """One tag per word, carried by its first piece; span F1 (seqeval) for BIO tags, token accuracy otherwise.

    Words are given to the tokenizer so that the pieces are those of the text with a blank between any two: what is
    trained is what a pipeline over plain text runs on.
    """

    type = "token-classification"
    fields = Fields(("tokens", "tags"), answer="tags")
    auto_class = "AutoModelForTokenClassification"
    metric = "f1"

    @classmethod
    def labels_of(cls, rows: Sequence[Row]) -> tuple[str, ...]:
        return tuple(sorted({tag for row in rows for tag in row["tags"]}))

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        features = []
        for some in _at_once(rows):
            words = [row["tokens"] for row in some]
            if wants_blanks(self.tokenizer):
                words = [with_blanks(row) for row in words]
            encoded = self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.max_length)
            for i, row in enumerate(some):
                feature = self._feature(encoded, i, row)
                if "tags" in row:
                    if len(row["tags"]) != len(row["tokens"]):
                        tags = f"{len(row['tags'])} tags for {len(row['tokens'])} tokens"
                        raise UserError(f"data: {row[ROW_KEY]}: {tags}")
                    feature["labels"] = self._align(encoded.word_ids(i), row)
                features.append(feature)
        return features

    def cut(self, rows: Sequence[Row]) -> str | None:
        said = super().cut(rows)
        if said is None:
            return None
        spans, lost = 0, 0
        for row, feature in zip(rows, self.encode(rows), strict=True):
            # A tag a word, of the first words.
            kept = sum(label != IGNORE for label in feature["labels"])
            ends = self._ends(row["tags"])
            spans, lost = spans + len(ends), lost + sum(end >= kept for end in ends)
        what = "entities" if self.bio else "tags"
        return f"{said}; {lost} of {spans} {what} end behind the cut, where no metric counts them"

    @property
    def bio(self) -> bool:
        """Whether tags mark entities: O, B-TYPE, I-TYPE."""
        return all(name == "O" or name[:2] in ("B-", "I-") for name in self.labels)

    def _ends(self, tags: Sequence[str]) -> list[int]:
        """The last word of every entity, or every word where tags are no entities'."""
        from seqeval.metrics.sequence_labeling import get_entities

        return [end for _, _, end in get_entities(list(tags))] if self.bio else list(range(len(tags)))

    def _no_label(self, feature: dict[str, Any]) -> list[int]:
        return [IGNORE] * len(feature["input_ids"])

    def _align(self, words: list[int | None], row: Row) -> list[int]:
        previous, labels = None, []
        for word in words:
            first = word is not None and word != previous
            labels.append(self._label(row, "tag", row["tags"][word]) if first and word is not None else IGNORE)
            previous = word
        return labels

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        return torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels])

    def metrics(self, evidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        keep = labels != IGNORE
        accuracy = float((evidence[keep] == labels[keep]).mean()) if keep.any() else 0.0
        if not self.bio:
            return {"f1": accuracy, "accuracy": accuracy}
        from seqeval.metrics import f1_score

        truth = [[self.labels[i] for i in row[m]] for row, m in zip(labels, keep, strict=True)]
        guess = [[self.labels[i] for i in row[m]] for row, m in zip(evidence, keep, strict=True)]
        return {"f1": float(f1_score(truth, guess, zero_division=0)), "accuracy": accuracy}  # type: ignore[arg-type]


class CausalLM(Task):
    """Next-token prediction; perplexity.

    Running text is packed into blocks of `max_length` tokens. Rows with a `prompt` stay apart: prompt, end token, text,
    end token, and only the text and its end count (Li & Liang 2021, "Prefix-Tuning", section 3.1).
    """

    type = "causal-lm"
    fields = Fields(("text",), ("prompt",))
    auto_class = "AutoModelForCausalLM"
    metric = "perplexity"
    greater_is_better = False

    def model_arguments(self) -> dict[str, Any]:
        return {}

    def cut(self, rows: Sequence[Row]) -> str | None:
        # Running text goes on in the next block.
        return super().cut(rows) if rows and "prompt" in rows[0] else None

    def encode(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        if rows and "prompt" in rows[0]:
            return [self._answered(row) for row in steps(rows, ENCODING)]
        end = self.tokenizer.eos_token_id
        stream: list[int] = []
        for row in steps(rows, ENCODING):
            stream += self.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            if end is not None:
                stream.append(end)
        blocks = [stream[i : i + self.max_length] for i in range(0, len(stream), self.max_length)]
        blocks = [block for block in blocks if len(block) > 1]
        if not blocks:
            raise UserError("data: the text has fewer than two tokens")
        return [{"input_ids": b, "attention_mask": [1] * len(b), "labels": list(b)} for b in blocks]

    def _answered(self, row: Row) -> dict[str, Any]:
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        prompt, text = (
            [*self.tokenizer(row[name], add_special_tokens=False)["input_ids"], *end] for name in ("prompt", "text")
        )
        if not prompt or len(prompt) >= self.max_length:
            raise UserError(
                f"data: {row[ROW_KEY]}: a prompt of {len(prompt)} tokens; wants at least 1 and, so that text follows, "
                f"fewer than data.max_length {self.max_length}"
            )
        if not text:
            raise UserError(f"data: {row[ROW_KEY]}: the text has no token, and this tokenizer has no end token")
        ids = (prompt + text)[: self.max_length]
        labels = ([IGNORE] * len(prompt) + text)[: self.max_length]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        return torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels])

    def evidence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Per row the summed surprise in nats and the number of tokens that it was summed over, (B, 2) float64."""
        found = torch.zeros(len(logits), 2, dtype=torch.float64, device=logits.device)
        # Row by row: the log-probabilities of a whole batch would be as large as its logits.
        for i, (row, target) in enumerate(zip(logits, labels[:, 1:], strict=True)):
            keep = target != IGNORE
            scores, goal = row[:-1][keep].float(), target[keep]
            found[i, 0] = torch.nn.functional.cross_entropy(scores, goal, reduction="none").double().sum()
            found[i, 1] = len(goal)
        return found

    def metrics(self, evidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        surprise, tokens = evidence.sum(0)
        return {"perplexity": math.exp(min(surprise / max(tokens, 1), 80.0))}


TASKS: dict[str, type[Task]] = {
    task.type: task for task in (SequenceClassification, Regression, TokenClassification, CausalLM)
}


def make_task(name: str, tokenizer: Any, max_length: int, labels: Sequence[str] = ()) -> Task:
    """The task of a recipe, ready to encode rows."""
    return TASKS[name](tokenizer, max_length, labels)
