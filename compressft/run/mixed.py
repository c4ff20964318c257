"""Several feeds in one stage: whose batch comes when, and the heads that stand next to the model's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset

from compressft.data.table import taken
from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.modules.kinds import Extra
from compressft.recipe.program import Stage
from compressft.run.feed import Feeds, LengthGroupedSampler
from compressft.tasks.encode import tokens_of
from compressft.tasks.task import Feature, Task

# Which feed a batch is of, and a row; no model is given it.
FEED = "feed"
HEADS = "feed_heads"


@dataclass(frozen=True)
class Side:
    """A feed besides a stage's first one.

    Attributes:
        view: a model of the class that its task wants, over the backbone of the model that is trained.
        rows: its training rows, corrupted in every epoch where the task does that.
        batches: how many batches of it an epoch has, of the rows that all processes take at once.
    """

    view: nn.Module
    task: Task
    rows: Dataset[Feature] | Sequence[Feature]
    batches: int


def batches_of(sizes: Sequence[int], shares: Sequence[float | None], batch: int, temperature: float) -> list[int]:
    """How many batches of each feed an epoch has; the first one's rows are seen once.

    Args:
        sizes: rows of each feed.
        shares: fractions of the steps, where they are given; the others divide the rest by size ** (1 / temperature)
            (Arivazhagan et al. 2019, arXiv:1907.05019, section 4.1).

    Raises:
        UserError: the shares leave nothing for a feed that has none.
    """
    given = sum(share for share in shares if share is not None)
    free = [size ** (1.0 / temperature) if share is None else 0.0 for size, share in zip(sizes, shares, strict=True)]
    if given >= 1.0 and any(free):
        raise UserError(f"feeds: the shares are {given:g} together and leave nothing for the feed that has none")
    total = sum(free)
    parts = [
        share if share is not None else (1.0 - given) * weight / total
        for share, weight in zip(shares, free, strict=True)
    ]
    first = math.ceil(sizes[0] / batch)
    return [first, *(max(1, round(first * part / parts[0])) for part in parts[1:])]


def side_batches(feeds: Feeds, stage: Stage, batch: int) -> list[int]:
    """How many batches of so many rows an epoch has of each of a stage's other feeds."""
    first, *others = feeds.each(stage)
    if not others:
        return []
    sizes = [len(first.features(stage)[0]), *(len(rows.train) for rows in others)]
    return batches_of(sizes, [one.share for one in stage.feeds], batch, stage.temperature)[1:]


def seen(feeds: Feeds, stage: Stage) -> np.ndarray:
    """Tokens of each row that an epoch of a stage trains on, of all its feeds."""
    first, *others = feeds.each(stage)
    lengths = [tokens_of(first.features(stage)[0], first.task)]
    for rows, count in zip(others, side_batches(feeds, stage, stage.train.batch_size), strict=True):
        lengths.append(np.resize(tokens_of(rows.train, rows.task), count * stage.train.batch_size))
    return np.concatenate(lengths)


class Joined(Dataset[Feature]):
    """The rows of all feeds, one after the other; each row says whose it is."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.starts = [sum(len(part) for part in parts[:k]) for k in range(len(parts))]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Feature:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Feature]:
        """Several at once: what a DataLoader asks for; a batch is of one feed."""
        feed = max(k for k, start in enumerate(self.starts) if start <= indices[0])
        own = [index - self.starts[feed] for index in indices]
        return [{**row, FEED: feed} for row in taken(self.parts[feed], own)]


def collate_by(tasks: Sequence[Task]) -> Callable[[Sequence[Feature]], dict[str, Tensor]]:
    """Batches of one feed's rows, as its task pads them; `feed` () int64 says whose they are."""

    def collate(rows: Sequence[Feature]) -> dict[str, Tensor]:
        feed = rows[0][FEED]
        batch = tasks[feed].collate([{key: value for key, value in row.items() if key != FEED} for row in rows])
        return {**batch, FEED: torch.tensor(feed)}

    return collate


class MixedBatches(BatchSampler):
    """Batches of one feed each, in an order that is a pure function of seed and epoch.

    A feed whose share is larger than its rows goes round; one whose share is smaller goes on in the next epoch where it
    stopped. Batches that are not full are left out, unless a feed has no full one.

    Args:
        samplers: one for each feed, whose orders are already in batches.
        counts: batches of each feed in an epoch.
    """

    def __init__(
        self, samplers: Sequence[LengthGroupedSampler], counts: Sequence[int], batch_size: int, seed: int
    ) -> None:
        super().__init__(samplers[0], batch_size, drop_last=False)
        self.samplers = list(samplers)
        self.starts = [sum(len(one) for one in samplers[:k]) for k in range(len(samplers))]
        self.counts = list(counts)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[list[int]]:
        order = [feed for feed, count in enumerate(self.counts) for _ in range(count)]
        random.Random(f"feeds {self.seed} {self.epoch}").shuffle(order)
        sources = [self._endless(feed) for feed in range(len(self.samplers))]
        for feed in order:
            yield next(sources[feed])

    def _endless(self, feed: int) -> Iterator[list[int]]:
        """This epoch's batches of a feed, from where the last epoch stopped."""
        sampler, start = self.samplers[feed], self.starts[feed]
        whole = max(len(sampler) // self.batch_size, 1)
        # The first feed is seen once an epoch, its short batch too.
        first = feed == 0
        pass_, place = (self.epoch, 0) if first else divmod(self.epoch * self.counts[feed], whole)
        while True:
            flat = [start + i for i in sampler.order(pass_)]
            batches = [flat[i : i + self.batch_size] for i in range(0, len(flat), self.batch_size)]
            full = [one for one in batches if len(one) == self.batch_size]
            yield from (batches if first or not full else full)[place:]
            pass_, place = pass_ + 1, 0


class Dealt(BatchSampler):
    """Each batch cut into parts, one after the other, for processes to take in turns; a short one's rows go round."""

    def __init__(self, batches: MixedBatches, parts: int) -> None:
        super().__init__(batches.sampler, batches.batch_size // parts, drop_last=False)
        self.batches = batches
        self.parts = parts

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            whole = [batch[i % len(batch)] for i in range(self.batch_size * self.parts)]
            yield from (whole[i : i + self.batch_size] for i in range(0, len(whole), self.batch_size))


class FeedHeads(Extra):
    """The heads of a stage's other feeds, while it trains: children of the model, so that they are trained and saved.

    What is tied (a language model's output layer is the model's table) is saved once.
    """

    def __init__(self, views: Sequence[nn.Module], own: nn.Module) -> None:
        super().__init__()
        for number, view in enumerate(views, 1):
            head = nn.Module()
            prefix = anatomy(view).prefix
            for name, child in view.named_children():
                if name != prefix:
                    head.add_module(name, child)
            self.add_module(str(number), head)
        # In a tuple, so that the model is not registered inside itself.
        self._own = (own,)
        self.register_state_dict_post_hook(_without_shared)


def _without_shared(heads: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    seen = {heads._own[0].get_input_embeddings().weight.data_ptr()}
    for name in [name for name in state if name.startswith(prefix)]:
        if isinstance(state[name], Tensor) and state[name].numel():
            if state[name].data_ptr() in seen:
                del state[name]
            else:
                seen.add(state[name].data_ptr())


def take_heads(model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """Take the other feeds' heads out of a trained model: their tensors by feed number, empty where there are none."""
    heads = getattr(model, HEADS, None)
    if heads is None:
        return {}
    delattr(model, HEADS)
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in heads.state_dict().items():
        number, _, rest = name.partition(".")
        found.setdefault(int(number), {})[rest] = tensor.detach().cpu().clone()
    return found


def fill_head(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Give a model the head that `take_heads` took out of another one."""
    missing = model.load_state_dict(dict(tensors), strict=False).unexpected_keys
    assert not missing, missing
    return model
