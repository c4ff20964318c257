"""MiniLM's tokenizer, shared by the tests of tasks."""

import pytest

from compressft.model.source import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer("minilm")
