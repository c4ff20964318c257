"""Words that are already split, given to a tokenizer so that their pieces are those of the text they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressft.errors import UserError

WHO = "task token-classification: this tokenizer"
# Words that a tokenizer is asked about: with a mark inside and by itself.
PROBE = ("Ana", "isn't", "in", "St.", "Ives", ",", "no")


def with_blanks(words: Sequence[str]) -> list[str]:
    """Every word but the first with the blank that stands before it in a text; empty words and own blanks stay."""
    return [f" {word}" if i and word and not word[0].isspace() else word for i, word in enumerate(words)]


def wants_blanks(tokenizer: Any) -> bool:
    """Whether words have the pieces that they have inside a text only with the blank in front of them.

    So it is with byte-level pieces (GPT-2, RoBERTa, Qwen), which the blank is part of, unless `add_prefix_space`.

    Raises:
        UserError: the tokenizer does not say which piece is of which word; or its pieces are bytes, and those of words
            are not those of the text, whatever stands in front of them.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{WHO} ({type(tokenizer).__name__}) does not say whose word a piece is; take a fast one")

    def pieces(text: Any, split: bool = True) -> list[int]:
        return tokenizer(text, is_split_into_words=split, add_special_tokens=False)["input_ids"]

    text = pieces(" ".join(PROBE), split=False)
    if pieces(list(PROBE)) == text:
        return False
    if pieces(with_blanks(PROBE)) == text:
        return True
    if "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer):
        raise UserError(f"{WHO} cuts words otherwise than the text that they make; load it with add_prefix_space: true")
    return False
