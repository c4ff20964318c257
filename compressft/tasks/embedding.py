"""Embedding: a text becomes one vector, near those of texts that mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.errors import UserError
from compressft.model.embedder import AUTO_CLASS, Pooling
from compressft.tasks.regress import correlations
from compressft.tasks.task import Feature, Task, TaskSettings
from compressft.transform import without_labels

# Of a feature: those of the texts that the first one is compared with.
OTHERS = "others"
# Queries that are ranked at once.
QUERIES = 1024
# At this rank a retrieved text still counts (Nguyen et al. 2016, MS MARCO).
RANKS = 10


class EmbeddingSettings(TaskSettings):
    """`pooling`: "mean" of a text's tokens, its first ("cls") or its "last" one; vectors have length one.

    `loss`: "contrastive" for pairs of texts that belong together, told from the other pairs of the batch, and from
    `negative` where rows have one; "similarity" for pairs with a `score` from `least` to `most`, which the cosine is to
    give from 0 to 1. `temperature` divides the cosines of a contrastive loss. `metric`: "mrr" finds every row's second
    text among those of all rows, "spearman" compares cosines with scores; the one of the loss by default.
    """

    type: Literal["embedding"] = "embedding"
    pooling: Pooling = "mean"
    loss: Literal["contrastive", "similarity"] = "contrastive"
    temperature: float = Field(default=0.05, gt=0)
    least: float = 0.0
    most: float = 1.0
    metric: Literal["mrr", "spearman"] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> EmbeddingSettings:
        if self.most <= self.least:
            raise ValueError(f"most: {self.most} is not above least {self.least}")
        return self


class Embedding(Task):
    """One vector for a text; its cosine with another's says how much they mean the same.

    Contrastive: cross-entropy of the pair among all second texts of the batch (van den Oord et al. 2018, equation 4,
    with cosines; Henderson et al. 2017, section 4.4), of which those that read the same are left out. Similarity:
    squared error of the cosine (Reimers & Gurevych 2019, "Sentence-BERT", section 3).
    """

    type = "embedding"
    fields = Fields(("text", "text_b"), ("negative", "score"), answer="score", numbers=("score",))
    auto_class = AUTO_CLASS
    settings_class = EmbeddingSettings
    settings: EmbeddingSettings
    answers = False
    ships = "sentence_embedding"

    @property
    def metric(self) -> str:  # type: ignore[override]
        """The one that counts."""
        return self.settings.metric or {"contrastive": "mrr", "similarity": "spearman"}[self.settings.loss]

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return self.type, (self.settings.pooling,)

    def model_arguments(self) -> dict[str, Any]:
        return {"pad_token_id": self.tokenizer.pad_token_id, "pooling": self.settings.pooling}

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        texts = [name for name in ("text", "text_b", "negative") if rows and name in rows[0]]
        parts = [self._tokenise([{"text": row[name], ROW_KEY: row[ROW_KEY]} for row in rows]) for name in texts]
        features = []
        for row, first, *others in zip(rows, *parts, strict=True):
            features.append({**first, OTHERS: others, "labels": self._wanted(row)})
        return features

    def _wanted(self, row: Row) -> float:
        """The cosine that a row asks for; no number where it has no score."""
        scored = self.settings.loss == "similarity" or self.metric == "spearman"
        if "score" not in row:
            if self.settings.loss == "similarity":
                raise UserError(
                    f"data: {row[ROW_KEY]}: has no score, which task.loss 'similarity' compares with; give a column "
                    "'score', or take loss: contrastive"
                )
            return math.nan
        least, most = self.settings.least, self.settings.most
        if scored and not least <= row["score"] <= most:
            raise UserError(
                f"data: {row[ROW_KEY]}: score {row['score']:g} is outside of {least:g} to {most:g}; set task.least and "
                "task.most to the ends of the scale"
            )
        return (row["score"] - least) / (most - least)

    def length(self, row: Feature) -> int:
        return max(len(one["input_ids"]) for one in (row, *row[OTHERS]))

    def tokens(self, row: Feature) -> int:
        return (1 + len(row[OTHERS])) * self.length(row)

    def pieces(self, row: Feature) -> Sequence[int]:
        return [i for one in (row, *row[OTHERS]) for i in one["input_ids"]]

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """All first texts, then all second ones, then the negatives: (texts * B, T); `labels` (B,) float."""
        parts = [[{**without_labels(row), OTHERS: None} for row in features]]
        parts += [list(one) for one in zip(*(row[OTHERS] for row in features), strict=True)]
        texts = [{name: value for name, value in one.items() if name != OTHERS} for part in parts for one in part]
        batch = super().collate(texts)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in features], dtype=torch.float32)
        return batch

    def asked(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return without_labels(batch)

    def by_row(self, logits: Tensor, rows: int) -> Tensor:
        """(texts * B, d) -> (B, texts, d)."""
        return logits.unflatten(0, (-1, rows)).transpose(0, 1)

    def own(self, answer: Any, row: Feature) -> Any:
        return answer

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        rows = len(batch["labels"])
        first, second, *negative = outputs["logits"].unflatten(0, (-1, rows))
        if self.settings.loss == "similarity":
            return F.mse_loss((first * second).sum(-1), batch["labels"])
        cosines = first @ torch.cat([second, *negative]).t() / self.settings.temperature
        cosines = cosines.masked_fill(_alike(batch, rows), -torch.inf)
        return F.cross_entropy(cosines, torch.arange(rows, device=cosines.device))

    def predictions(self, logits: Tensor) -> Tensor:
        return logits

    def truth(self, rows: Sequence[Feature]) -> Any:
        """The cosines that are asked for, (B,) float."""
        wanted = super().truth(rows)
        if self.metric == "spearman" and bool(wanted.isnan().any()):
            raise UserError(
                "data: validation or test rows have no score, which task.metric 'spearman' compares with; give a "
                "column 'score', or take metric: mrr"
            )
        return wanted

    def evidence(self, answers: Tensor, truth: Any) -> Tensor:
        """The cosine of each row's pair (B,); of a ranking the two vectors, (B, 2, d)."""
        pair = answers[:, :2].float()
        return (pair[:, 0] * pair[:, 1]).sum(-1).double() if self.metric == "spearman" else pair

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        if self.metric == "mrr":
            return ranking(evidence[:, 0], evidence[:, 1])
        return correlations(evidence, truth)


def ranking(queries: np.ndarray, candidates: np.ndarray) -> dict[str, float]:
    """How well query i finds candidate i, both (n, d) of length one: mean reciprocal rank up to 10, and accuracy.

    Candidates that are the same as the right one stand behind it.
    """
    ranks = []
    for start in range(0, len(queries), QUERIES):
        cosines = queries[start : start + QUERIES] @ candidates.T
        right = cosines[np.arange(len(cosines)), start + np.arange(len(cosines))]
        ranks.append(1 + (cosines > right[:, None]).sum(1))
    rank = np.concatenate(ranks)
    return {"mrr": float(np.where(rank <= RANKS, 1.0 / rank, 0.0).mean()), "accuracy": float((rank == 1).mean())}


def _alike(batch: Mapping[str, Tensor], rows: int) -> Tensor:
    """Candidates (B, C) that read the same as a row's own second text and are no wrong answers, bool."""
    ids = batch["input_ids"] * batch["attention_mask"] - (1 - batch["attention_mask"])
    candidates = ids[rows:]
    same = (candidates[:rows, None] == candidates[None]).all(-1)
    return same & ~torch.eye(rows, len(candidates), dtype=torch.bool, device=ids.device)
