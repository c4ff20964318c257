"""Regression: one number per text or pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import Row
from compressft.tasks.task import Feature, Task


class Regression(Task):
    """One number per text or pair of texts; Pearson correlation (0 where the predictions are constant)."""

    type = "regression"
    fields = Fields(("text", "score"), ("text_b",), answer="score", numbers=("score",))
    auto_class = "AutoModelForSequenceClassification"
    metric = "pearson"
    answers = False

    def model_arguments(self) -> dict[str, Any]:
        return {"pad_token_id": self.tokenizer.pad_token_id, "num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        features = self._tokenise(rows)
        for feature, row in zip(features, rows, strict=True):
            if "score" in row:
                feature["labels"] = row["score"]
        return features

    def _collate_labels(self, labels: list[Any], width: int) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def predictions(self, logits: Tensor) -> Tensor:
        return logits.reshape(len(logits)).double()

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        return correlations(evidence, truth)


def correlations(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's of two rows of numbers; 0 where one is constant."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(found) == 0 or np.ptp(truth) == 0 or len(truth) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(found, truth)[0]), "spearman": float(spearmanr(found, truth)[0])}  # type: ignore[arg-type]
