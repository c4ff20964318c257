"""Masked language modelling: hidden tokens are predicted from both sides."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import Row
from compressft.errors import UserError
from compressft.tasks.corrupt import budget, choose, generator, hide, whole_words
from compressft.tasks.task import IGNORE, Feature, Task, TaskSettings, at_once

# What a feature keeps of its row as it was: ids, and the word that each is a piece of.
WHOLE, WORDS = "whole", "words"


class MaskedLMSettings(TaskSettings):
    """`rate`: fraction of the pieces that are hidden. `whole_words`: all pieces of a word or none. `packed`: texts are
    joined, with the separator between them, and cut into rows of `data.max_length`; else every text is a row.
    """

    type: Literal["masked-lm"] = "masked-lm"
    rate: float = Field(default=0.15, gt=0, lt=1)
    whole_words: bool = False
    packed: bool = True


class MaskedLM(Task):
    """Predict hidden tokens (Devlin et al. 2019, "BERT", section 3.1); perplexity over them, and accuracy.

    Training draws again each epoch; all other rows are hidden in one way, which depends on their place alone.
    """

    type = "masked-lm"
    fields = Fields(("text",))
    auto_class = "AutoModelForMaskedLM"
    metric = "perplexity"
    greater_is_better = False
    settings_class = MaskedLMSettings
    settings: MaskedLMSettings
    corrupts = True
    hidden_keys = (WHOLE, WORDS)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.tokenizer.mask_token_id is None:
            raise UserError(
                "task masked-lm: the tokenizer has no mask token; take the model of a masked LM, as BERT is"
            )

    def model_arguments(self) -> dict[str, Any]:
        return {"pad_token_id": self.tokenizer.pad_token_id}

    def cut(self, parts: Iterable[Sequence[Row]], everything: Sequence[Row]) -> str | None:
        # Packed texts go on in the next row.
        return None if self.settings.packed else super().cut(parts, everything)

    def joins(self, rows: Sequence[Row]) -> bool:
        # Also where every text is a row: which tokens are hidden depends on how many there were before.
        return True

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        return [feature for part in self.encode_parts([rows]) for feature in part]

    def encode_parts(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        seen = 0
        for features in (self._packed if self.settings.packed else self._apart)(parts):
            yield [self.corrupt(feature, generator(0, 0, seen + i)) for i, feature in enumerate(features)]
            seen += len(features)

    def corrupt(self, feature: Feature, draws: random.Random) -> Feature:
        """Hide other tokens of a row; `labels` are the hidden ones."""
        ids, words = feature[WHOLE], feature[WORDS]
        units = whole_words(words) if self.settings.whole_words else [[i] for i, w in enumerate(words) if w is not None]
        places = choose(units, budget(len(ids), self.settings.rate), draws)
        labels = [IGNORE] * len(ids)
        for place in places:
            labels[place] = ids[place]
        hidden = hide(ids, places, self.tokenizer.mask_token_id, len(self.tokenizer), draws)
        return {**feature, "input_ids": hidden, "labels": labels}

    def _apart(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        for rows in chain.from_iterable(map(at_once, parts)):
            encoded = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.max_length)
            features = [self._feature_of(encoded["input_ids"][i], encoded.word_ids(i)) for i in range(len(rows))]
            yield [feature for feature in features if any(word is not None for word in feature[WORDS])]

    def _packed(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        front, back = self._ends()
        size = self.max_length - len(front) - len(back)
        none, before = True, 0
        ids: list[int] = []
        words: list[int | None] = []
        for rows in chain(chain.from_iterable(map(at_once, parts)), [()]):
            for row_ids, row_words in self._pieces_of(rows):
                # Words of several texts are numbered on, and in a row from its first token.
                seen = before + len(ids)
                ids += row_ids
                words += [None if word is None else seen + word for word in row_words]
            features = []
            # The last row, a short one, is there when all texts are.
            last = len(ids) - len(ids) % size if rows else len(ids)
            for start in range(0, last, size):
                own = ids[start : start + size]
                own_words = [w if w is None else w - before - start for w in words[start : start + size]]
                if back[:1] == own[-1:]:
                    # The separator after a text that ends here is the row's own.
                    own, own_words = own[:-1], own_words[:-1]
                whole = [None] * len(front) + own_words + [None] * len(back)
                features.append(self._feature_of([*front, *own, *back], whole))
            ids, words, before = ids[last:], words[last:], before + last
            features = [feature for feature in features if any(word is not None for word in feature[WORDS])]
            none = none and not features
            yield features
        if none:
            raise UserError("data: the text has no token that could be hidden")

    def _pieces_of(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], list[int | None]]]:
        """Of each text its pieces and which word each is of, with the separator after it."""
        if not rows:
            return
        encoded = self.tokenizer([row["text"] for row in rows], add_special_tokens=False, verbose=False)
        end = [] if self.tokenizer.sep_token_id is None else [self.tokenizer.sep_token_id]
        for i in range(len(rows)):
            yield [*encoded["input_ids"][i], *end], [*encoded.word_ids(i), *[None] * len(end)]

    def _ends(self) -> tuple[list[int], list[int]]:
        """The special pieces that the tokenizer puts before and after a text."""
        ids = self.tokenizer(self.tokenizer.mask_token)["input_ids"]
        at = ids.index(self.tokenizer.mask_token_id)
        return ids[:at], ids[at + 1 :]

    def _feature_of(self, ids: Sequence[int], words: Sequence[int | None]) -> Feature:
        return {"input_ids": list(ids), "attention_mask": [1] * len(ids), WHOLE: list(ids), WORDS: list(words)}

    def evidence(self, answers: Tensor, truth: Tensor) -> Tensor:
        """Per row the summed surprise in nats, how many tokens were hidden and how many found, (B, 3) float64."""
        found = torch.zeros(len(answers), 3, dtype=torch.float64, device=answers.device)
        for i, (row, target) in enumerate(zip(answers, truth, strict=True)):
            keep = target != IGNORE
            scores, goal = row[keep].float(), target[keep]
            found[i, 0] = torch.nn.functional.cross_entropy(scores, goal, reduction="none").double().sum()
            found[i, 1] = len(goal)
            found[i, 2] = (scores.argmax(-1) == goal).sum()
        return found

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        surprise, tokens, right = evidence.sum(0)
        tokens = max(tokens, 1)
        return {"perplexity": math.exp(min(surprise / tokens, 80.0)), "accuracy": float(right / tokens)}
