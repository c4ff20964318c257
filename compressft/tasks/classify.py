"""Sequence classification: one label per text or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressft.data.fields import Fields
from compressft.data.rows import Row
from compressft.tasks.task import Feature, Task


class SequenceClassification(Task):
    """One label per text or pair of texts; accuracy."""

    type = "sequence-classification"
    fields = Fields(("text", "label"), ("text_b",), label="label", answer="label")
    auto_class = "AutoModelForSequenceClassification"
    metric = "accuracy"
    teachable = True
    chooses = True

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        features = self._tokenise(rows)
        for feature, row in zip(features, rows, strict=True):
            if "label" in row:
                feature["labels"] = self._label(row, "label", row["label"])
        return features

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import accuracy_score, f1_score

        return {
            "accuracy": float(accuracy_score(truth, evidence)),
            "f1_macro": float(f1_score(truth, evidence, average="macro", zero_division=0.0)),  # type: ignore[arg-type]
        }
