"""Sequence to sequence: an encoder-decoder reads one text and writes another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressft.data.fields import Fields
from compressft.data.rows import ROW_KEY, Row
from compressft.errors import UserError
from compressft.tasks.task import ENCODING, IGNORE, UNCUT, Feature, Task, TaskSettings, share
from compressft.tasks.written import bleu, bleu_counts, rouge_l
from compressft.utils.phases import steps

# What a feature keeps of its row: the text that is to be written, whole.
REFERENCE = "reference"


class Seq2SeqSettings(TaskSettings):
    """`prefix`: what stands before every text, such as T5's "summarize: ". `target_length`: tokens to which texts to be
    written are cut, and that `generate` writes at most. `beams`: of beam search; 1 takes the likeliest token each time.
    `metric`: "rouge_l" (Lin 2004) or "bleu" (Papineni et al. 2002, by sacrebleu), over whole written texts.
    """

    type: Literal["seq2seq"] = "seq2seq"
    prefix: str = ""
    target_length: int = Field(default=128, ge=2)
    beams: int = Field(default=1, ge=1)
    metric: Literal["rouge_l", "bleu"] = "rouge_l"


class Seq2Seq(Task):
    """Write the target of a text (Sutskever et al. 2014): cross-entropy of its tokens, scored by what is written.

    A causal language model that goes on from a prompt is task causal-lm.
    """

    type = "seq2seq"
    fields = Fields(("text", "target"), answer="target")
    auto_class = "AutoModelForSeq2SeqLM"
    settings_class = Seq2SeqSettings
    settings: Seq2SeqSettings
    hidden_keys = (REFERENCE,)
    generates = True
    ships = None

    @property
    def metric(self) -> str:  # type: ignore[override]
        """The one that counts."""
        return self.settings.metric

    def model_arguments(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[Row]) -> list[Feature]:
        return [self._encoded(row) for row in steps(rows, ENCODING)]

    def _encoded(self, row: Row) -> Feature:
        text = self.tokenizer(self.settings.prefix + row["text"], truncation=True, max_length=self.max_length)
        feature: Feature = {name: list(text[name]) for name in ("input_ids", "attention_mask")}
        if "target" not in row:
            return feature
        ids = self.tokenizer(text_target=row["target"], truncation=True, max_length=self._most)["input_ids"]
        if not ids:
            raise UserError(f"data: {row[ROW_KEY]}: the target has no token, and this tokenizer adds none; remove it")
        return {**feature, "labels": list(ids), REFERENCE: row["target"]}

    @property
    def _most(self) -> int:
        """Tokens of a target; all of them where it is asked how long rows are."""
        return UNCUT if self.max_length == UNCUT else self.settings.target_length

    def full(self, row: Feature) -> bool:
        return len(row["input_ids"]) >= self.max_length or len(row.get("labels", ())) >= self.settings.target_length

    def cut(self, parts: Iterable[Sequence[Row]], everything: Sequence[Row]) -> str | None:
        uncut = self.remade(max_length=UNCUT)
        texts, targets = 0, 0
        for feature in (feature for rows in parts for feature in uncut.encode(rows)):
            texts += len(feature["input_ids"]) > self.max_length
            targets += len(feature.get("labels", ())) > self.settings.target_length
        said = [
            f"{share(number, len(everything), what)} longer than {field} {most} and are cut"
            for number, what, field, most in (
                (texts, "texts", "data.max_length", self.max_length),
                (targets, "targets", "task.target_length", self.settings.target_length),
            )
            if number
        ]
        return "; ".join(said) or None

    def length(self, row: Feature) -> int:
        return max(len(row["input_ids"]), len(row.get("labels", ())))

    def tokens(self, row: Feature) -> int:
        return len(row["input_ids"]) + len(row.get("labels", ()))

    def pieces(self, row: Feature) -> Sequence[int]:
        return [*row["input_ids"], *row.get("labels", ())]

    def own(self, answer: Any, row: Feature) -> Any:
        return answer[: len(row["labels"])]

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Texts as ever; of targets `labels` (B, U), and what the decoder is given: one token later, with its mask."""
        answered = [{k: v for k, v in row.items() if k not in ("labels", REFERENCE)} for row in features]
        batch = super().collate(answered)
        if "labels" not in features[0]:
            return batch
        width = max(len(row["labels"]) for row in features)
        batch["labels"] = self._collate_labels([row["labels"] for row in features], width)
        real = batch["labels"].ne(IGNORE)
        # As the decoder reads it: what it starts with, then the target but for its last token.
        given = batch["labels"].masked_fill(~real, self.tokenizer.pad_token_id).roll(1, 1)
        given[:, 0] = self._start
        return {**batch, "decoder_input_ids": given, "decoder_attention_mask": real.long()}

    @property
    def _start(self) -> int:
        """The token that a decoder starts with."""
        found = getattr(self.config, "decoder_start_token_id", None)
        if found is None:
            raise UserError(
                "task seq2seq: the model's configuration has no decoder_start_token_id; take an encoder-decoder, as T5 "
                "and BART are"
            )
        return found

    def inputs(self, rows: Sequence[Feature]) -> dict[str, Tensor]:
        batch = self.collate([dict(row) for row in rows])
        batch.pop("labels", None)
        return batch

    def generate(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Ids (B, U) that a model writes, `beams` wide, at most `target_length` of them."""
        return model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.settings.target_length,
            num_beams=self.settings.beams,
            do_sample=False,
        )

    def truth(self, rows: Sequence[Feature]) -> Any:
        """The texts that are to be written, whole."""
        return np.array([row[REFERENCE] for row in rows], dtype=object)

    def evidence(self, answers: Tensor, truth: Any) -> Tensor:
        """What each written text adds to the metrics: ROUGE-L, and BLEU's counts where it is asked for."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return torch.tensor(
            [
                [rouge_l(text, wanted), *(bleu_counts(text, wanted) if self.metric == "bleu" else ())]
                for text, wanted in zip(texts, truth, strict=True)
            ],
            dtype=torch.float64,
        )

    def metrics(self, evidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
        found = {"rouge_l": float(evidence[:, 0].mean())}
        return {**found, "bleu": bleu(evidence[:, 1:].sum(0))} if self.metric == "bleu" else found
