"""Corruptions of token ids: which units are hidden, and by what; every draw comes from the generator that is given."""

from __future__ import annotations

import random
from collections.abc import Sequence

# Of the chosen pieces: how many become the mask, how many a random piece; the rest stay (Devlin et al. 2019, 3.1).
MASKED, RANDOM = 0.8, 0.1


def generator(seed: int, epoch: int, row: int) -> random.Random:
    """Draws that depend on these three alone, so that a resumed or distributed run draws the same."""
    return random.Random(f"{seed} {epoch} {row}")


def budget(length: int, rate: float) -> int:
    """How many pieces of a row are hidden, at least one.

    Args:
        length: pieces of the row, special ones included.
    """
    return max(1, round(length * rate))


def whole_words(words: Sequence[int | None]) -> list[list[int]]:
    """Places of each word's pieces, in order; special pieces (None) are of no word."""
    units: dict[int, list[int]] = {}
    for place, word in enumerate(words):
        if word is not None:
            units.setdefault(word, []).append(place)
    return list(units.values())


def choose(units: Sequence[Sequence[int]], number: int, draws: random.Random) -> list[int]:
    """Places of the units that are hidden: drawn until `number` pieces; a unit that would pass it is skipped whole.

    Where no unit is that small the smallest one is taken, so that every row has something to predict.
    """
    order = draws.sample(range(len(units)), len(units))
    chosen: list[int] = []
    for unit in order:
        if len(chosen) + len(units[unit]) <= number:
            chosen += units[unit]
    return sorted(chosen or min(units, key=len, default=[]))


def hide(ids: Sequence[int], places: Sequence[int], mask: int, vocabulary: int, draws: random.Random) -> list[int]:
    """The ids with each place hidden: 80 % the mask, 10 % any piece of the vocabulary, 10 % as it was."""
    hidden = list(ids)
    for place in places:
        drawn = draws.random()
        if drawn < MASKED:
            hidden[place] = mask
        elif drawn < MASKED + RANDOM:
            hidden[place] = draws.randrange(vocabulary)
    return hidden
