"""What does not belong into a run directory: links out of it are refused, what a killed process left goes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from compressft.errors import UserError

# What a run or an export writes there, replaces and deletes.
WRITTEN = (
    *("checkpoints", "cache", "delta", "memo", "model", "onnx", "onnx.failed", "report", "stages"),
    *("identity.json", "metrics.jsonl", "recipe.yaml", ".lock"),
)
# Name prefix of the folder in which models are measured, and of a checkpoint that is being deleted.
MEASURING, DROPPED = ".measuring-", ".dropped-"
# Folder -> names of what is unfinished there, and is renamed or deleted by the process that made it.
UNFINISHED = {
    "": re.compile(rf"\.(model|delta|onnx)\.(tmp|old)|\.(recipe|metrics|identity)\.tmp|{re.escape(MEASURING)}.+"),
    "stages": re.compile(r"\.[A-Za-z0-9_-]+\.(tmp|old)"),
    "memo": re.compile(r"\..+\.json\.tmp"),
    "report": re.compile(r"\..+\.\d+\.tmp"),
    "checkpoints": re.compile(rf"\.writing|{re.escape(DROPPED)}step-\d+"),
}
# Earlier versions measured in a folder that Python named, with these in it.
SCRATCH, MEASURED = re.compile(r"tmp[a-z0-9_]{8}"), {"dense", ".dense.tmp", "base.onnx", "base.onnx.data"}


def refuse_links(root: Path) -> None:
    """Refuse a run directory where writing and deleting would follow a link elsewhere; it may be a link itself.

    Raises:
        UserError: an entry, at any depth, is a symbolic link out of it, or one of what a run writes is a link at all.
    """
    inside = Path(os.path.realpath(root))
    for link in _links(root):
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(inside) or (link.parent == root and link.name in WRITTEN):
            raise UserError(
                f"{link}: is a symbolic link to {target}, where a run would write and delete; remove the link, or "
                "move what it points to here"
            )


def _links(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path)
            elif entry.is_dir():
                yield from _links(Path(entry.path))


def sweep(root: Path) -> None:
    """Remove what a killed process left unfinished, by the names that we give it; whoever calls this holds the lock.

    A folder that was moved aside for another, which never came, is moved back.
    """
    for name, ours in UNFINISHED.items():
        for path in _entries(root / name):
            if ours.fullmatch(path.name):
                home = path.with_name(path.name[1:].removesuffix(".old"))
                if path.suffix == ".old" and not home.exists():
                    path.rename(home)
                else:
                    _remove(path)
    for path in _entries(root):
        if SCRATCH.fullmatch(path.name) and path.is_dir() and {one.name for one in path.iterdir()} <= MEASURED:
            _remove(path)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
