"""Vocabulary pruning: the embedding rows, the tied head and the tokenizer keep only what the task's texts use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compressft.errors import UserError
from compressft.model.shrink import keep_vocabulary
from compressft.modules.pretrained import pretrained
from compressft.passes.shared.trim import trim
from compressft.transform import REMOVES, Claim, Context, Transform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary(Transform):
    """Keep the pieces of the training rows, labelled or not, a reserve, and every single character.

    Rows go before training starts, so gradients and optimiser state shrink too. Training texts are cut exactly as
    before; a new text may be cut into more and shorter pieces, but gets no unknown token that it had not before
    (`passes/trim.py`). On a small encoder this is the largest lever on bytes: half of MiniLM's parameters are rows.
    Teachers loaded in the same stage lose the same rows.

    Fields: `min_count`: pieces seen less often in the training rows go. `limit`: at most this many pieces by
    frequency, besides characters and special tokens. `reserve`: words or texts whose pieces stay; `reserve_file`: the
    same, one a line.
    """

    type: Literal["vocabulary"] = "vocabulary"
    order: ClassVar[int] = REMOVES
    min_count: int = Field(default=1, ge=1)
    limit: int | None = Field(default=None, ge=1)
    reserve: tuple[str, ...] = ()
    reserve_file: str | None = None

    def prepare(self, model: nn.Module, context: Context) -> None:
        if context.data is None:
            raise UserError("pass vocabulary: needs training rows to look at; run it in a recipe's stage")
        old: PreTrainedTokenizerBase = context.data.tokenizer
        texts = (*context.data.features, *context.data.unlabelled())
        counts = Counter(i for feature in texts for i in context.data.pieces(feature))
        for special in old.all_special_ids:
            del counts[special]
        frequent = [i for i, n in counts.most_common(self.limit) if n >= self.min_count]
        tokenizer, kept = trim(old, [*frequent, *self._reserved(old)])
        size = _rows(model)
        if kept[-1] >= size:
            raise UserError(f"pass vocabulary: the tokenizer knows {len(old)} pieces, the model has {size} rows")
        rows = torch.tensor(kept)
        keep_vocabulary(model, rows)

        def fit(teacher: nn.Module) -> None:
            has = _rows(teacher)
            if has == size:
                keep_vocabulary(teacher, rows)
            elif has != len(rows):
                raise UserError(
                    f"pass vocabulary: the teacher has {has} rows, the student {size} before and {len(rows)} after"
                )

        context.fit_teacher.append(fit)
        context.data.retokenise(tokenizer)

    def changes(self) -> Sequence[Claim]:
        # Rows of the embeddings are no part of a layer.
        return ()

    def inputs(self) -> Sequence[str]:
        return () if self.reserve_file is None else (self.reserve_file,)

    def _reserved(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        texts = list(self.reserve)
        if self.reserve_file is not None:
            path = Path(self.reserve_file)
            if not path.is_file():
                raise UserError(f"pass vocabulary.reserve_file: {str(path)!r} does not exist")
            texts += [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _rows(model: nn.Module) -> int:
    table = pretrained(model).get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings
