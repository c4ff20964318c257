"""What a manifest must say before a folder is read by it: fields and their types, its own hash, the same labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from compressft.errors import UserError, nearest
from compressft.utils.files import document_hash
from compressft.utils.texts import JSON

FORMAT = 1
# The field with the hash of all others; folders of before have none.
SEAL = "hash"
# Kind -> fields without which its folder cannot be read; older folders lack the others.
REQUIRED: dict[str, tuple[str, ...]] = {
    "model": ("architecture", "shapes", "modules", "files"),
    "delta": ("architecture", "base_hash", "config", "shapes", "modules", "files"),
    "onnx": ("files",),
    "checkpoint": ("stage", "step", "seconds", "files"),
}


class Contents(TypedDict):
    """What a folder says of a model, `layers_hash` and `origin_hash` of its base. No folder has all of the fields."""

    kind: str
    format: int
    architecture: str
    shapes: list[dict[str, int]]
    width: int | None
    modules: dict[str, dict[str, JSON]]
    files: dict[str, str]
    layers_hash: str
    origin_hash: str | None


class Manifest(Contents):
    """A `compressft.json`; `REQUIRED` has what each kind of folder must say."""

    base_hash: str
    config: dict[str, JSON]
    model: str
    from_stage: str
    recipe_hash: str
    task: str
    task_settings: JSON
    labels: list[str]
    columns: dict[str, str]
    max_length: int
    # A checkpoint's is a name, a model's a document.
    stage: Any
    step: int
    seconds: float
    done: bool
    tokens: int
    examples: int
    processes: int


class AdapterContents(Contents):
    """What the folder of an adapter says under our key."""

    method: dict[str, JSON]
    base: str
    labels: dict[str, str]


Check = tuple[str, Callable[[object], bool]]


def _mapping(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(of(item) for item in value.values())


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _layer(value: object) -> bool:
    return isinstance(value, dict) and all(_count(value.get(name)) for name in ("kv_heads", "ffn"))


def _module(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(value.get(slot, {}), dict) for slot in ("quantizer", "adapter")) and isinstance(
        value.get("kind"), str
    )


TEXT: Check = ("a string", lambda value: isinstance(value, str))
# Field -> (what it wants, whether a value is that).
CHECKS: dict[str, Check] = {
    **dict.fromkeys(("architecture", "base_hash", "layers_hash", "model", "base", "task"), TEXT),
    # A folder's name next to the delta's.
    "from_stage": ("a stage's name", lambda v: isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9_-]+", v) is not None),
    "origin_hash": ("a string or null", lambda value: value is None or isinstance(value, str)),
    "config": ("an object with model_type", lambda v: isinstance(v, dict) and isinstance(v.get("model_type"), str)),
    "shapes": ("a list of layers with kv_heads and ffn", lambda v: isinstance(v, list) and all(map(_layer, v))),
    "width": ("a number or null", lambda value: value is None or _count(value)),
    "modules": ("an object of modules, each with its kind", lambda value: _mapping(value, _module)),
    "files": ("an object of hashes by file name", lambda v: _mapping(v, lambda item: isinstance(item, str))),
    "labels": ("a list of strings", _texts),
    "columns": ("an object of strings", lambda value: _mapping(value, lambda item: isinstance(item, str))),
    "max_length": ("a number from 1", lambda value: type(value) is int and value > 0),
    "step": ("a number", _count),
    SEAL: TEXT,
    "seconds": ("a number", lambda value: isinstance(value, int | float)),
    "stage": ("an object", lambda value: isinstance(value, dict)),
}
# Kind -> fields that are something else there.
SPECIAL: dict[str, dict[str, Check]] = {
    "onnx": {"modules": ("a list of strings", _texts)},
    "checkpoint": {"stage": TEXT},
    "adapter": {
        "labels": (
            "an object of strings by number",
            lambda v: isinstance(v, dict) and all(isinstance(v[key], str) and key.isdecimal() for key in v),
        )
    },
}


def check_manifest(entry: object, path: Path) -> Manifest:
    """The content of a `compressft.json`, checked.

    Raises:
        UserError: it is no object, of an unknown kind or a newer format, or a field is missing or of another type.
    """
    if not isinstance(entry, dict):
        raise UserError(f"{path}: wants a JSON object, holds {type(entry).__name__}; restore the file")
    require(entry, ("kind",), path)
    kind = entry["kind"]
    if not isinstance(kind, str) or kind not in REQUIRED:
        known = ", ".join(REQUIRED)
        raise UserError(f"{path}: kind {kind!r} is not known; known: {known}{nearest(str(kind), REQUIRED)}")
    if entry.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: format {entry['format']!r}; this compressft reads {FORMAT}")
    require(entry, REQUIRED[kind], path)
    check_types(entry, kind, path)
    check_seal(entry, path)
    # As checked.
    return cast("Manifest", entry)


def as_adapter(entry: Mapping[str, object]) -> AdapterContents:
    """The same object, whose fields have been checked."""
    return cast("AdapterContents", entry)


def check_seal(entry: Mapping[str, object], path: Path) -> None:
    """UserError where what was `sealed` has changed; older files have no seal."""
    if SEAL in entry and entry[SEAL] != _digest(entry):
        raise UserError(f"{path}: was changed after it was written (its hash is another); restore the file")


def sealed(entry: Mapping[str, object]) -> dict[str, object]:
    """A manifest with its own hash."""
    return {**entry, SEAL: _digest(entry)}


def _digest(entry: Mapping[str, object]) -> str:
    # Through JSON, as it will be read.
    return document_hash(json.loads(json.dumps({name: value for name, value in entry.items() if name != SEAL})))


def compare_labels(entry: Mapping[str, object], config: object, path: Path) -> None:
    """A manifest's labels and those of the configuration next to it, which other programs read, are the same.

    Raises:
        UserError: they are not.
    """
    labels = entry.get("labels")
    named = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(labels, list) or not labels or not isinstance(named, dict):
        return
    own = [str(named.get(str(i), named.get(i))) for i in range(len(named))]
    # The library's own names say nothing.
    if all(name.startswith("LABEL_") for name in own):
        return
    if own != labels:
        at = next((i for i, pair in enumerate(zip(own, labels, strict=False)) if pair[0] != pair[1]), len(labels))
        first, second = (names[at] if at < len(names) else "none" for names in (labels, own))
        raise UserError(
            f"{path}: label {at} is {first!r} here and {second!r} in the configuration next to it; restore the folder"
        )


def require(entry: Mapping[str, object], names: Iterable[str], path: Path) -> None:
    """UserError for the first of these fields that is not there."""
    for name in names:
        if name not in entry:
            raise UserError(f"{path}: field {name!r} is missing; restore the file or write the folder again")


def check_types(entry: Mapping[str, object], kind: str, path: Path, prefix: str = "") -> None:
    """UserError for the first field whose value is of another type than a folder of this kind has there."""
    checks = CHECKS | SPECIAL.get(kind, {})
    for name, value in entry.items():
        wanted, fits = checks.get(name, ("", None))
        if fits is not None and not fits(value):
            shown = repr(value) if len(repr(value)) < 40 else type(value).__name__
            raise UserError(f"{path}: field {prefix + name!r} wants {wanted}, holds {shown}; restore the file")
