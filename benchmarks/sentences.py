"""Sentences cut from reviews: texts without labels for a teacher to answer, written like those of the task."""

from __future__ import annotations

import json
import re
from pathlib import Path


def cut(reviews: Path, target: Path, shortest: int = 4, longest: int = 35) -> Path:
    """Write the sentences of `reviews` (JSON Lines, `text`) as {"text"}: lower case, punctuation apart, as in SST-2.

    Args:
        shortest, longest: words a sentence may have.

    Returns:
        `target`, written once.
    """
    if target.is_file():
        return target
    found: dict[str, None] = {}
    for line in reviews.read_text(encoding="utf-8").splitlines():
        for sentence in re.split(r"(?<=[.!?])\s+", json.loads(line)["text"].lower()):
            if shortest <= len(sentence.split()) <= longest:
                found[" ".join(re.sub(r'([.,!?;:()"])', r" \1 ", sentence).split())] = None
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_suffix(".tmp")
    staging.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    staging.rename(target)
    return target
