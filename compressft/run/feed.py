"""The rows of a stage as features, and the order in which training takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from compressft.data.splits import Splits
from compressft.recipe.program import Stage
from compressft.tasks import make_task
from compressft.tasks.task import Task
from compressft.transform import TrainingData
from compressft.utils.phases import phase


def row_lengths(rows: StageRows) -> list[int]:
    """Tokens of each row of all splits."""
    test = rows.task.encode(rows.splits.test) if rows.splits.test else []
    return [len(row["input_ids"]) for row in (*rows.train, *rows.validation, *rows.unlabelled, *test)]


class StageRows:
    """Training and validation rows as features, encoded anew where a pass changes the tokenizer."""

    def __init__(self, task: Task, splits: Splits) -> None:
        self.splits = splits
        self.task = task
        self._encode()

    @phase("loading")
    def _encode(self) -> None:
        self.train = self.task.encode(self.splits.train)
        self.unlabelled = self.task.encode_unlabelled(self.splits.unlabelled)
        self.validation = self.task.encode(self.splits.validation)

    def retokenise(self, tokenizer: Any) -> list[dict[str, Any]]:
        """Go on with another tokenizer; returns the training features."""
        self.task = make_task(self.task.type, tokenizer, self.task.max_length, self.task.labels)
        self._encode()
        return self.train

    def features(self, stage: Stage) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What this stage trains on, and validation; rows without labels where something answers for them."""
        taught = any(objective.answers for objective in stage.objectives)
        return self.train + (self.unlabelled if taught else []), self.validation

    def data(self) -> TrainingData:
        """What Transforms see of it."""
        return TrainingData(
            self.task.tokenizer,
            self.train,
            self.task.collate,
            self.retokenise,
            self.task.max_length,
            lambda: self.unlabelled,
        )


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then sorts by length inside chunks of 50 batches, then shuffles the batches: little padding.

    The order is a pure function of seed and epoch, which is what makes a resumed run see the same batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        chunk = 50 * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), chunk):
            ordered = sorted(order[start : start + chunk], key=lambda i: self.lengths[i], reverse=True)
            batches += [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        # A short batch stays last: the loader cuts the flat order into batches again.
        short = [b for b in batches if len(b) < self.batch_size]
        full = [b for b in batches if len(b) == self.batch_size]
        for position in torch.randperm(len(full), generator=generator).tolist():
            yield from full[position]
        for batch in short:
            yield from batch
