"""The rows of a stage as features, and the order in which training takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from compressft.data.rows import Row
from compressft.data.splits import Splits, load_pool, load_splits
from compressft.data.table import chained, taken
from compressft.model.labels import in_order_of, refuse_alike
from compressft.model.source import resolve
from compressft.recipe.program import Stage
from compressft.recipe.recipe import Feed, Recipe
from compressft.tasks import TASKS, make_task
from compressft.tasks.corrupt import generator
from compressft.tasks.encode import encoded, lengths_of
from compressft.tasks.task import Feature, Task
from compressft.transform import TrainingData
from compressft.utils.foreign import load_config
from compressft.utils.phases import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FeedRows:
    """One feed's rows as features, encoded when first asked for and again where a pass changes the tokenizer."""

    def __init__(self, feed: Feed, task: Task, splits: Splits) -> None:
        self.feed = feed
        self.task = task
        self.splits = splits
        self.joined: list[Row] = []
        self._encoded: dict[str, Sequence[Feature]] = {}

    def _rows(self, name: str) -> Sequence[Feature]:
        if name not in self._encoded:
            own = encoded(getattr(self.splits, name), self.task, name == "unlabelled")
            more = encoded(self.joined, self.task) if name == "train" else []
            self._encoded[name] = chained(own, more)
        return self._encoded[name]

    @property
    def train(self) -> Sequence[Feature]:
        """Training rows."""
        return self._rows("train")

    @property
    def validation(self) -> Sequence[Feature]:
        """Validation rows."""
        return self._rows("validation")

    @property
    def unlabelled(self) -> Sequence[Feature]:
        """Rows for which a teacher answers."""
        return self._rows("unlabelled")

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row of all splits, (rows,)."""
        names = ("train", "validation", "unlabelled", "test")
        return np.concatenate([lengths_of(self._rows(name), self.task) for name in names])

    def take(self, rows: list[Row]) -> None:
        """Train on these rows of selections too."""
        self.joined = rows
        self._encoded.pop("train", None)

    def retokenise(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on with another tokenizer."""
        self.task = self.task.remade(tokenizer)
        self._encoded = {}

    def data(self, retokenise: Callable[[PreTrainedTokenizerBase], None] | None = None) -> TrainingData:
        """What Transforms see of the rows.

        Args:
            retokenise: makes others go on with another tokenizer too; None where these rows are all there are.
        """

        def replace(tokenizer: PreTrainedTokenizerBase) -> Sequence[Feature]:
            (retokenise or self.retokenise)(tokenizer)
            return self.train

        task = self.task
        return TrainingData(
            task.tokenizer,
            self.train,
            task.collate,
            replace,
            task.max_length,
            lambda: self.unlabelled,
            task.pieces,
        )

    def features(self, stage: Stage) -> tuple[Sequence[Feature], Sequence[Feature]]:
        """What this stage trains on, and validation; rows without labels where something answers for them."""
        taught = any(objective.answers for objective in stage.objectives)
        return (chained(self.train, self.unlabelled) if taught else self.train), self.validation


class Feeds:
    """The rows of all stages: those of one task and source are there once."""

    def __init__(self, recipe: Recipe, rows: Sequence[FeedRows]) -> None:
        self.recipe = recipe
        self.all = tuple(rows)
        self.joined: dict[str, list[Row]] = {}

    def of(self, stage: Stage) -> FeedRows:
        """The rows of a stage's first feed."""
        return self.each(stage)[0]

    @property
    def sources(self) -> list[FeedRows]:
        """One for each task and source, whatever selections join it."""
        found: list[FeedRows] = []
        for rows in self.all:
            if all(rows.feed.origin != other.feed.origin for other in found):
                found.append(rows)
        return found

    def each(self, stage: Stage) -> list[FeedRows]:
        """The rows of all of a stage's feeds."""
        return [next(rows for rows in self.all if rows.feed == feed) for feed in self.recipe.feeds(stage)]

    @property
    def shipped(self) -> FeedRows:
        """Those of the last stage."""
        return self.of(self.recipe.stages[-1])

    def join(self, name: str, rows: list[Row]) -> None:
        """A selection was made: its rows join the feeds that name it."""
        self.joined[name] = rows
        for one in self.all:
            if name in one.feed.more:
                one.take([row for more in one.feed.more for row in self.joined.get(more, ())])

    def retokenise(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Go on with another tokenizer, everywhere."""
        for rows in self.all:
            rows.retokenise(tokenizer)

    def data(self, stage: Stage) -> TrainingData:
        """What a stage's Transforms see of its rows."""
        return self.of(stage).data(self.retokenise)


@phase("loading")
def load_feed(feed: Feed, model: str, tokenizer: PreTrainedTokenizerBase) -> FeedRows:
    """A feed's rows, and its task with the labels of all training rows as given.

    Args:
        model: the recipe's model; labels have its order where it has just these.

    Raises:
        UserError: a file, column, row or label is wrong.
    """
    kind, config = TASKS[feed.task.type], load_config(resolve(model))
    mask: str | None = getattr(tokenizer, "mask_token", None)
    splits = load_splits(feed.data, kind.fields, mask)
    known = kind.labels_of(splits.known)
    refuse_alike(known)
    labels = in_order_of(known, config)
    return FeedRows(feed, make_task(feed.task, tokenizer, feed.data.max_length, labels, config), splits)


def load_feeds(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Feeds:
    """The rows of all of a recipe's stages, read before anything is trained.

    Raises:
        UserError: as `load_feed`.
    """
    found: list[Feed] = []
    for stage in recipe.stages:
        found += [feed for feed in recipe.feeds(stage) if feed not in found]
    loaded: list[FeedRows] = []
    for feed in found:
        # With other selections it is the same source.
        same = next((rows for rows in loaded if rows.feed.origin == feed.origin), None)
        loaded.append(FeedRows(feed, same.task, same.splits) if same else load_feed(feed, recipe.model, tokenizer))
    feeds = Feeds(recipe, loaded)
    by_name = {stage.name: stage for stage in recipe.stages}
    for stage in recipe.stages:
        for select in stage.select:
            task = feeds.of(by_name[select.by[0]]).task
            task.refuse_other_labels(load_pool(recipe.sources[select.pool], task.fields, select.type == "uncertain"))
    return feeds


def load_shipped(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> FeedRows:
    """The rows of the last stage alone: what evaluation and export want."""
    return load_feed(recipe.shipped, recipe.model, tokenizer)


def model_info(recipe: Recipe, rows: FeedRows, recipe_hash: str) -> dict[str, Any]:
    """What a shipped folder must know to be evaluated on its own."""
    task, data = rows.task, rows.feed.data
    settings = task.settings.model_dump(mode="json")
    return {
        "model": recipe.model,
        "task": task.type,
        # A name alone says no more than the task does.
        **({} if isinstance(settings, str) else {"task_settings": settings}),
        "labels": list(task.labels),
        "max_length": data.max_length,
        "columns": dict(data.columns),
        "metric": task.metric,
        "recipe_hash": recipe_hash,
    }


class Corrupted(Dataset[Feature]):
    """Training rows of a task that changes them: each one again in every epoch, by seed, epoch and row alone."""

    def __init__(self, features: Sequence[Feature], task: Task, seed: int) -> None:
        self.features = features
        self.task = task
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, row: int) -> Feature:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Feature]:
        """Several at once: what a DataLoader asks for."""
        found = zip(rows, taken(self.features, rows), strict=True)
        return [self.task.corrupt(feature, generator(self.seed, self.epoch, row)) for row, feature in found]


def training_rows(features: Sequence[Feature], task: Task, seed: int) -> Any:
    """What training reads: the features, or what the task makes of them in every epoch."""
    return Corrupted(features, task, seed) if task.corrupts else features


def training_lengths(rows: Any, task: Task) -> np.ndarray:
    """Tokens of each row; those of rows that change with the epoch do not."""
    return lengths_of(rows.features if isinstance(rows, Corrupted) else rows, task)


class LengthGroupedSampler(Sampler[int]):
    """Shuffles, then sorts by length inside chunks of 50 batches, then shuffles the batches: little padding.

    The order is a pure function of seed and epoch, which is what makes a resumed run see the same batches.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, rows: Any = None) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch; rows that change with it are told."""
        self.epoch = epoch
        if isinstance(self.rows, Corrupted):
            self.rows.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        return self.order(self.epoch)

    def order(self, epoch: int) -> Iterator[int]:
        """The rows of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        chunk = 50 * self.batch_size
        for start in range(0, len(order), chunk):
            own = order[start : start + chunk]
            order[start : start + chunk] = own[np.argsort(-self.lengths[own], kind="stable")]
        # A short batch stays last: the loader cuts the flat order into batches again.
        full = len(order) // self.batch_size
        batches = order[: full * self.batch_size].reshape(full, self.batch_size)
        for position in torch.randperm(full, generator=generator).tolist():
            yield from batches[position].tolist()
        yield from order[full * self.batch_size :].tolist()
