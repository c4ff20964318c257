"""Tiny random models saved as Hugging Face folders with MiniLM's tokenizer, data files and recipes for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from compressft.model.source import load_tokenizer
from tests.tiny import TINY

WORDS = ("apple", "river", "stone", "cloud", "lamp", "winter", "garden", "paper")


def save_tiny(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """A two-layer random model of hidden size 32 that plain `from_pretrained` loads, and the tokenizer."""
    tokenizer = load_tokenizer("minilm")
    settings = TINY[family][1] if family in TINY else TINY["bert"][1]
    config = transformers.AutoConfig.for_model(family, **{**settings, "vocab_size": len(tokenizer), **changes})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(number: int = 40) -> list[dict[str, str]]:
    """Two labels in turn, texts of two to nine words."""
    return [
        {
            "text": " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(2 + i % 8)),
            "label": "even" if i % 2 else "odd",
        }
        for i in range(number)
    ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def document(model: str | Path, data: str | Path, **changes: Any) -> dict[str, Any]:
    """A recipe of one full stage, as plain data."""
    return {
        "name": "tiny",
        "model": str(model),
        "data": {"train": str(data), "max_length": 16},
        "stages": [{"name": "only", "train": {"epochs": 1, "batch_size": 8}}],
        **changes,
    }
