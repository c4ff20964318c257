"""Causal language modelling: the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.errors import UserError
from compressft.tasks.task import ENCODING, IGNORE, Feature, Task
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

    def cut(self, rows: Sequence[Row]) -> str | None:
        # Running text goes on in the next block.
        return super().cut(rows) if rows and "prompt" in rows[0] else None

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
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
