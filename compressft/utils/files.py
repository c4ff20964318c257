"""Files written whole or not at all, flushed to the disk, and known by their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; computed again where its size or time of change is another."""
    state = path.stat()
    # The time of change of the inode cannot be set back, that of the content can.
    return _hash(path.resolve(), state.st_size, (state.st_mtime_ns, state.st_ctime_ns), state.st_ino)


def file_state(path: Path) -> str:
    """Size and time of change of a file that is too large to be read for its hash."""
    state = path.stat()
    return f"{state.st_size} bytes, changed {state.st_mtime_ns}"


@lru_cache(maxsize=1024)
def _hash(path: Path, size: int, changed: tuple[int, int], number: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary folder)`, fsync what it wrote, then rename it to `folder` (replacing an older one)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        write(staging)
        share(staging)
        sync(staging)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            staging.rename(folder)
            shutil.rmtree(old)
        else:
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def share(folder: Path) -> None:
    """Give files the user's usual permissions; safetensors makes its own readable to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def sync(folder: Path) -> None:
    """Flush every file below a folder, and the folder, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def document_hash(document: object) -> str:
    """Content hash of plain data, "sha256:..."; the order of keys says nothing."""
    return "sha256:" + hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Make a file's content, or a rename inside a directory, durable."""
    if os.name == "nt" and path.is_dir():
        # Windows cannot open directories.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
