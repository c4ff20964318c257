"""What README and guide show: blocks of commands and Python, and why some cannot run here."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A comment right above a block, which pages do not show.
MARKER = r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?"
FENCE = re.compile(rf"^{MARKER}```(?P<language>\w+)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        reason: why it does not run in the tests; None where it does.
    """

    page: Path
    language: str
    text: str
    reason: str | None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line, without comments."""
        lines = self.text.splitlines() if self.language == "bash" else []
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, one["language"], one["text"], one["reason"]) for one in FENCE.finditer(text)]
