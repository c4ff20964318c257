"""Every entry of a registry has its row among the tests' settings."""

import pytest

from tests.settings import ROWS, made


@pytest.mark.parametrize("rows, registry", ROWS, ids=["methods", "passes", "objectives"])
def test_every_entry_has_a_row(rows, registry):
    assert rows.keys() == registry.keys()
    assert all(registry[name].model_fields["type"].default == name for name in registry)
    assert all(made(name, ("a", "b")).type == name for name in registry)
