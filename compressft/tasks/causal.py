"""Causal language modelling: the next token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.errors import UserError
from compressft.tasks.task import ENCODING, IGNORE, Feature, Task, at_once
from compressft.utils.phases import steps


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
    caches = True

    def model_arguments(self) -> dict[str, Any]:
        return {}

    def cut(self, parts: Iterable[Sequence[Row]], everything: Sequence[Row]) -> str | None:
        # Running text goes on in the next block.
        return None if self.joins(everything) else super().cut(parts, everything)

    def joins(self, rows: Sequence[Row]) -> bool:
        return bool(rows) and "prompt" not in rows[0]

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        if not self.joins(rows):
            return [self._answered(row) for row in steps(rows, ENCODING)]
        return [feature for part in self.encode_parts([rows]) for feature in part]

    def encode_parts(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        parts = iter(parts)
        first = next(parts, ())
        parts = chain([first], parts)
        return self._packed(parts) if self.joins(first) else super().encode_parts(parts)

    def _packed(self, parts: Iterable[Sequence[Row]]) -> Iterator[list[Feature]]:
        """Blocks of the texts one after the other, an end token behind each."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        stream: list[int] = []
        none = True
        for rows in chain(chain.from_iterable(map(at_once, parts)), [()]):
            texts = [row["text"] for row in rows]
            for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ():
                stream += [*ids, *end]
            # The last block, a short one, is there when all texts are.
            last = len(stream) - len(stream) % self.max_length if rows else len(stream)
            blocks = [stream[i : min(i + self.max_length, last)] for i in range(0, last, self.max_length)]
            stream = stream[last:]
            blocks = [block for block in blocks if len(block) > 1]
            none = none and not blocks
            yield [{"input_ids": b, "attention_mask": [1] * len(b), "labels": list(b)} for b in blocks]
        if none:
            raise UserError("data: the text has fewer than two tokens")

    def _answered(self, row: Row) -> Feature:
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

    def evidence(self, answers: Tensor, truth: Tensor) -> Tensor:
        """Per row the summed surprise in nats and the number of tokens that it was summed over, (B, 2) float64."""
        found = torch.zeros(len(answers), 2, dtype=torch.float64, device=answers.device)
        # Row by row: the log-probabilities of a whole batch would be as large as its logits.
        for i, (row, target) in enumerate(zip(answers, truth[:, 1:], strict=True)):
            keep = target != IGNORE
            scores, goal = row[:-1][keep].float(), target[keep]
            found[i, 0] = torch.nn.functional.cross_entropy(scores, goal, reduction="none").double().sum()
            found[i, 1] = len(goal)
        return found

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        surprise, tokens = evidence.sum(0)
        return {"perplexity": math.exp(min(surprise / max(tokens, 1), 80.0))}
