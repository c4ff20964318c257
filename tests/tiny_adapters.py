"""Saved adapters of the tiny model that the joint runs train, made when they are first asked for."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from compressft.model.source import load_tokenizer
from compressft.passes.shared.trim import trim
from tests.methods.added import save_adapter
from tests.tiny import tiny


@cache
def joint_adapters() -> tuple[str, ...]:
    """Two delta/ folders, adapters of size 4, on `tiny` with the joint runs' vocabulary."""
    tokenizer, _ = trim(load_tokenizer("minilm"), range(1000, 3000))
    root = Path(tempfile.mkdtemp(prefix="adapters"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    size = len(tokenizer)
    return tuple(save_adapter(root / str(i), lambda: tiny(vocab_size=size, num_labels=2), seed=i) for i in (0, 1))
