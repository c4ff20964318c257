"""MiniLM's tokenizer and a writer of data files, shared by the data tests."""

from pathlib import Path

import pytest

from compressft.model.source import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("minilm")


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
