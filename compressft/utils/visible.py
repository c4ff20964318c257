"""Text that others wrote, made fit for a terminal and a page: no character in it does anything but be seen."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# Controls, orders of direction and halves of surrogate pairs; what text is laid out with stays.
HIDDEN = ("Cc", "Cs")
DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LAYOUT = "\n\t"


def visible(text: str) -> str:
    """`text` with every control character as its escape: ESC becomes \\x1b, a right-to-left override \\u202e."""
    if text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character in LAYOUT:
        return character
    if character in DIRECTIONS or unicodedata.category(character) in HIDDEN:
        return character.encode("unicode_escape").decode()
    return character


def all_visible(value: object) -> Any:
    """A copy of plain data with every text in it visible, keys too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {all_visible(key): all_visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [all_visible(item) for item in value]
    return value


class PlainConsole(Console):
    """A console that shows text as it is: neither markup nor emoji nor a terminal's own orders are read from it."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with visible text."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
