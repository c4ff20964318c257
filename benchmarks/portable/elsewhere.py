"""The demo's folder in other packages."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def tried(run: Path, folder: Path, console: Console) -> dict[str, str]:
    """What each of them said, in a line."""
    return {}
