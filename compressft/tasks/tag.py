"""Token classification: one tag per word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.data.table import distinct
from compressft.errors import UserError
from compressft.tasks.task import IGNORE, Feature, Task, at_once
from compressft.tasks.words import wants_blanks, with_blanks


class TokenClassification(Task):
    """One tag per word, carried by its first piece; span F1 (seqeval) for BIO tags, token accuracy otherwise.

    Words are given to the tokenizer so that the pieces are those of the text with a blank between any two: what is
    trained is what a pipeline over plain text runs on.
    """

    type = "token-classification"
    fields = Fields(("tokens", "tags"), answer="tags", words=("tokens", "tags"))
    auto_class = "AutoModelForTokenClassification"
    metric = "f1"
    teachable = True

    @classmethod
    def labels_of(cls, rows: Sequence[Row]) -> tuple[str, ...]:
        return tuple(distinct(rows, "tags"))

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        features = []
        for some in at_once(rows):
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

    def cut(self, parts: Iterable[Sequence[Row]], everything: Sequence[Row]) -> str | None:
        parts = list(parts)
        said = super().cut(parts, everything)
        if said is None:
            return None
        lost = 0
        for rows in parts:
            for row, feature in zip(rows, self.encode(rows), strict=True):
                # A tag a word, of the first words.
                kept = sum(label != IGNORE for label in feature["labels"])
                lost += sum(end >= kept for end in self._ends(row["tags"]))
        spans = sum(len(self._ends(row["tags"])) for row in everything)
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

    def _no_label(self, feature: Feature) -> list[int]:
        return [IGNORE] * len(feature["input_ids"])

    def _align(self, words: list[int | None], row: Row) -> list[int]:
        previous, labels = None, []
        for word in words:
            first = word is not None and word != previous
            labels.append(self._label(row, "tag", row["tags"][word]) if first and word is not None else IGNORE)
            previous = word
        return labels

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        keep = truth != IGNORE
        accuracy = float((evidence[keep] == truth[keep]).mean()) if keep.any() else 0.0
        if not self.bio:
            return {"f1": accuracy, "accuracy": accuracy}
        from seqeval.metrics import f1_score

        tags = [[self.labels[i] for i in row[m]] for row, m in zip(truth, keep, strict=True)]
        guess = [[self.labels[i] for i in row[m]] for row, m in zip(evidence, keep, strict=True)]
        return {"f1": float(f1_score(tags, guess, zero_division=0)), "accuracy": accuracy}  # type: ignore[arg-type]
