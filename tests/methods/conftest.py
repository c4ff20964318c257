"""Shared by the method tests: the declared trainable sets are compared by name, frozen tensors bit by bit."""

import pytest

from compressft.transform import Context, trainable
from tests.tiny import fit, labelled


@pytest.fixture
def check_training():
    """Prepare, train a few real steps, and compare what moved with the names that should."""

    def check(model, method, expected: set[str], steps: int = 3) -> None:
        method.prepare(model, Context())
        assert {name for name, _ in trainable(model)} == expected
        before = {name: value.clone() for name, value in model.state_dict().items()}
        fit(model, [method], [labelled()], steps)
        moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
        # A key's bias has no influence on attention's softmax: it may stay where it was.
        assert moved <= expected and {n for n in expected - moved if not n.endswith("key.bias")} == set()

    return check
