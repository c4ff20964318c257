"""The command line in this process: what it printed, and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from compressft import cli


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch, capfd, tmp_path) -> Callable[..., Done]:
    """Runs the command line in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    # On a busy machine something might take long enough to say so.
    monkeypatch.setattr("compressft.utils.phases.PATIENCE", 600.0)

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["compressft", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Done(code, *capfd.readouterr())

    return call
