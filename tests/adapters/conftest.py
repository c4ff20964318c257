"""Bases on the disk, one of each family, made when they are first asked for."""

from __future__ import annotations

import pytest

from tests.tiny import tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Gives the folder of a tiny model with a head of some class."""
    made = {}

    def folder(family="bert", architecture=None, **changes):
        key = (family, architecture, tuple(sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base")
            tiny(family, architecture=architecture, **changes).save_pretrained(made[key])
        return made[key]

    return folder
