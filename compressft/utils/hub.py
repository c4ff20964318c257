"""Names on the hub: which are ids there, and which revision they ask for."""

from __future__ import annotations

import re
from pathlib import Path

from compressft.errors import UserError

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def pinned(name: str) -> tuple[str, str | None]:
    """A hub id and the revision (branch, tag or commit) behind its "@": "owner/name@v1.0"; a folder's name is its own.

    Raises:
        UserError: one of the two is empty.
    """
    found, sign, revision = name.rpartition("@")
    if not sign or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return name, None
    if not found or not revision:
        raise UserError(f"{name!r}: names no revision of a repository; write owner/name@revision, or leave the @ out")
    return found, revision


def hub_id(name: str) -> str | None:
    """The id that others can load a model by, without its revision; None for a folder or a shipped name."""
    found, _ = pinned(name)
    return found if "/" in found and _ID.fullmatch(found) and not Path(found).exists() else None
