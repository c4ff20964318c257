"""The manifest of a saved folder and the hashes of its files, checked at every opening."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from compressft.errors import UserError
from compressft.model.saved.manifest import FORMAT, SEAL, Manifest, check_manifest, compare_labels, require, sealed
from compressft.utils.files import file_hash
from compressft.utils.phases import steps
from compressft.utils.texts import read_json

MANIFEST = "compressft.json"


def hash_files(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder but the manifest, by relative path."""
    return {
        path.relative_to(folder).as_posix(): file_hash(path)
        for path in steps(sorted(folder.rglob("*")), f"hashing {folder}")
        if path.is_file() and path.name != MANIFEST
    }


def verify_files(folder: Path, hashes: Mapping[str, str]) -> None:
    """Compare a folder's files with their recorded hashes.

    Raises:
        UserError: a file is missing or has changed; the message names it.
    """
    for name, expected in steps(list(hashes.items()), f"comparing the hashes of {folder}"):
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is missing; the folder is incomplete")
        if file_hash(path) != expected:
            raise UserError(
                f"{path}: its hash is not the recorded one: truncated or changed; restore or delete the folder"
            )


def manifest_seal(folder: Path) -> str | None:
    """The hash of a folder's manifest, and so of all its files; None in folders of before there was one.

    Raises:
        UserError: as `read_manifest`, whose files are not compared.
    """
    entry: Mapping[str, object] = {**read_manifest(folder, files=False)}
    return str(entry[SEAL]) if SEAL in entry else None


def write_manifest(folder: Path, kind: str, entry: Mapping[str, object]) -> None:
    """Write `compressft.json` next to files that are all there: with their hashes, and its own."""
    whole = {"format": FORMAT, "kind": kind, **entry, "files": hash_files(folder)}
    (folder / MANIFEST).write_text(json.dumps(sealed(whole), indent=1), encoding="utf-8")


def read_manifest(
    folder: str | Path, kind: str | None = None, also: Iterable[str] = (), files: bool = True
) -> Manifest:
    """`compressft.json` of a folder, whose files are what was written: the one door to a folder of ours.

    Args:
        kind: the only one that is wanted ("model", "delta", "onnx", "checkpoint").
        also: fields that are needed besides those of every folder of its kind.
        files: compare the files with their hashes; off where only the newest of many will be read.

    Raises:
        UserError: there is none, it is broken, lacks a field, or is of another kind; a file is missing or has changed;
            its labels are not the configuration's.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder}: has no {MANIFEST}; give a folder that compressft wrote (model/, delta/ or onnx/)")
    entry = check_manifest(read_json(path), path)
    if kind not in (None, entry["kind"]):
        raise UserError(f"{path}: is of a folder of kind {entry['kind']!r}; give one of kind {kind!r}")
    require(entry, also, path)
    if files:
        verify_files(Path(folder), entry["files"])
        config = Path(folder) / "config.json"
        compare_labels(entry, read_json(config) if config.is_file() else entry.get("config"), path)
    return entry
