"""Files of adapter folders: JSON, safetensors, and pickled tensors read without running what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressft.errors import UserError
from compressft.model.saved.adapters import ADAPTER_CONFIG as CONFIG
from compressft.model.saved.adapters import ADAPTER_KEY as KEY
from compressft.model.saved.adapters import ADAPTER_TENSORS as TENSORS
from compressft.utils.files import share
from compressft.utils.foreign import foreign, load_tensors
from compressft.utils.texts import parse_json, read_object

__all__ = [
    "CONFIG",
    "KEY",
    "TENSORS",
    "new_folder",
    "read_json",
    "read_metadata",
    "read_tensors",
    "refuse_filled",
    "write_json",
    "write_tensors",
]


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    if not path.is_file():
        raise UserError(f"{path}: is missing; the folder is incomplete")
    return read_object(path)


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from the first of these files that is there.

    Raises:
        UserError: none is there, or it cannot be read as plain tensors.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder / names[0]}: is missing; the folder is incomplete")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    with foreign(f"{path}: cannot be read as tensors"):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: wants tensors by name, holds something else")
    return dict(found)


def read_metadata(path: Path) -> dict[str, str]:
    """What we noted in a safetensors file's header, {} where another program wrote it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            noted = file.metadata() or {}
    except SafetensorError:
        return {}
    found = parse_json(noted.get(KEY, "{}"), str(path))
    if not isinstance(found, dict):
        raise UserError(f"{path}: {KEY} in its header wants an object, holds {type(found).__name__}")
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, every tensor of its own; `note` goes into the header, where other readers look past it.

    The file appears whole or not at all.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"} | ({} if note is None else {KEY: json.dumps(note)})
    staging = path.with_name(f".{path.name}.tmp")
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, staging, metadata=metadata)
    staging.rename(path)
    share(path.parent)


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a JSON file, which appears whole or not at all."""
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(values, indent=1), encoding="utf-8")
    staging.rename(path)


def refuse_filled(path: Path, field: str) -> None:
    """UserError where something is at this path already."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{field} {str(path)!r}: is not empty; give a folder that does not exist yet")


def new_folder(path: Path, field: str) -> Path:
    """Make a folder that is not there yet, or empty.

    Raises:
        UserError: something is there, or it cannot be made.
    """
    refuse_filled(path, field)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field} {str(path)!r}: cannot be made: {error.strerror or error}") from None
    return path
