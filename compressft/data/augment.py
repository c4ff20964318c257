"""More texts for a teacher to answer: training rows rewritten at random, without labels."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from compressft.data.rows import ROW_KEY, Row
from compressft.errors import UserError

if TYPE_CHECKING:
    from compressft.data.source import AugmentConfig


def rewritten(
    rows: Sequence[Row], inputs: Sequence[str], config: AugmentConfig, mask: str | None, seed: int
) -> Iterator[Row]:
    """`config.copies` rewritten copies per row, without labels; the same ones for the same seed.

    Each word is masked, replaced by a word of the rows (as often as it occurs there) or left out with the given
    probabilities; then, with probability `crop`, only a run of at least two words stays. After Tang et al. (2019,
    arXiv:1903.12136), section 3.3, where replacements keep the part of speech and runs have at most five words.

    Args:
        inputs: names of the fields that hold text, or a list of words.
        mask: the tokenizer's mask token.

    Raises:
        UserError: words are to be masked and the tokenizer has no mask token.
    """
    if config.mask > 0 and mask is None:
        raise UserError("data.augment.mask: the tokenizer has no mask token; set it to 0")
    generator = random.Random(seed)
    present = [name for name in inputs if rows and name in rows[0]]
    words = {name: Words(rows, name) for name in present}
    if not all(words.values()):
        return
    left = round(config.copies * len(rows))
    while left > 0:
        # Row by row, again and again.
        for row in islice(iter(rows), left):
            new: Row = {ROW_KEY: f"{row[ROW_KEY]} (rewritten)"}
            for name in present:
                changed = _rewrite(_words(row[name]), words[name], config, mask or "", generator)
                new[name] = changed if isinstance(row[name], list) else " ".join(changed)
            yield new
        left -= len(rows)


class Words(Sequence[str]):
    """The words of a field of all rows, one after the other, each as often as it occurs: four bytes for one."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        self.codes = array("I")
        known: dict[str, int] = {}
        for row in rows:
            self.codes.extend(known.setdefault(word, len(known)) for word in _words(row[name]))
        self.names = list(known)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self.names[self.codes[index]]


def _words(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else value.split()


def _rewrite(
    words: list[str], vocabulary: Sequence[str], config: AugmentConfig, mask: str, generator: random.Random
) -> list[str]:
    changed = []
    for word in words:
        drawn = generator.random()
        if drawn < config.mask:
            changed.append(mask)
        elif drawn < config.mask + config.replace:
            changed.append(generator.choice(vocabulary))
        elif drawn >= config.mask + config.replace + config.drop:
            changed.append(word)
    if len(changed) > 2 and generator.random() < config.crop:
        length = generator.randint(2, len(changed) - 1)
        start = generator.randint(0, len(changed) - length)
        changed = changed[start : start + length]
    # A text must not become empty.
    return changed or words[:1]
