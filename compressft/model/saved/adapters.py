"""Saved adapters: read them from `delta/` folders, refuse those of another base, put adapters into a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from compressft.errors import UserError, nearest
from compressft.model.anatomy import anatomy
from compressft.model.saved.delta import DELTA
from compressft.model.saved.folders import read_manifest, verify_files
from compressft.model.saved.manifest import AdapterContents, Contents, as_adapter, check_types
from compressft.model.saved.sparse import ROWS, unpack
from compressft.model.saved.state import layers_hash, plain_state
from compressft.model.surgery import adapter_in, pfeiffer_path
from compressft.modules.bottleneck import Bottleneck
from compressft.modules.invertible import INVERTIBLE, Invertible
from compressft.modules.kinds import KINDS
from compressft.utils.foreign import load_tensors
from compressft.utils.texts import JSON, read_object

Filled = TypeVar("Filled", bound=nn.Module)

# What a saved adapter's folder is made of, in every package's format; our own fields are under the key.
ADAPTER_CONFIG, ADAPTER_TENSORS, ADAPTER_KEY = "adapter_config.json", "adapter_model.safetensors", "compressft"
ADAPTER_FORMAT = 1
ADAPTER_FIELDS = {
    "format",
    "kind",
    "method",
    "base",
    "architecture",
    "labels",
    "layers_hash",
    "origin_hash",
    "shapes",
    "modules",
    "files",
}


@dataclass(frozen=True)
class SavedAdapter:
    """The adapters of one run in Pfeiffer's place.

    Attributes:
        folder: where they were read.
        layers: per layer, from the bottom up: one, or the whole stack that was there.
        invertible: that of the run, None where it had none.
    """

    folder: str
    layers: tuple[tuple[Bottleneck, ...], ...]
    invertible: Invertible | None


def read_adapters(model: nn.Module, folders: Sequence[str], who: str) -> list[SavedAdapter]:
    """Read adapters that were trained on this model's layers as they are now.

    Args:
        folders: `delta/` folders of runs with method adapter, placement pfeiffer, or adapters that we saved.
        who: the field that names them, for messages.

    Raises:
        UserError: a folder is missing, damaged or no delta; it holds other adapters, or more changes than adapters and
            head; it was trained on another base than the others, or than this model.
    """
    manifests = [_manifest(Path(folder).expanduser(), who) for folder in folders]
    bases = [manifest["layers_hash"] for manifest in manifests]
    for folder, base in zip(folders, bases, strict=True):
        if base != bases[0]:
            raise UserError(f"{who}: {folder!r} was trained on another base than {folders[0]!r}; give adapters of one")
    # A model without values is there to be counted.
    counted = next(model.parameters()).is_meta
    if bases and not counted and bases[0] != layers_hash(model, plain_state(model)[0]):
        raise UserError(
            f"{who}: {folders[0]!r} was trained on another base than the model here; "
            "set the recipe's model to the one that its run started from"
        )
    return [_read(model, folder, manifest, who) for folder, manifest in zip(folders, manifests, strict=True)]


def _manifest(folder: Path, who: str) -> Contents:
    if not folder.is_dir():
        raise UserError(f"{who}: folder {str(folder)!r} does not exist; give the delta/ folder of a run")
    if (folder / ADAPTER_CONFIG).is_file():
        return _saved(folder, who)
    manifest = read_manifest(folder)
    if manifest.get("kind") != "delta":
        raise UserError(f"{who}: {str(folder)!r} is no delta/ folder (kind {manifest.get('kind')!r}); give one")
    if "layers_hash" not in manifest:
        raise UserError(f"{who}: {str(folder)!r} was written before adapters could be read; train it again")
    return manifest


def _saved(folder: Path, who: str) -> AdapterContents:
    """What the folder of an adapter that we saved says, which is what a manifest does."""
    entry = adapter_entry(folder)
    if entry is None:
        raise UserError(
            f"{who}: {str(folder)!r} is another package's adapter; make it ours with: compressft convert {folder} DST"
        )
    return entry


def adapter_entry(folder: Path) -> AdapterContents | None:
    """What `adapter_config.json` says under our key, its files compared with their hashes; None: it has no such key.

    Raises:
        UserError: a file is missing or changed, or a field is missing, unknown or of another type.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{path}: is missing; the folder is incomplete")
    entry = read_object(path).get(ADAPTER_KEY)
    if not isinstance(entry, dict):
        return None
    for name in entry:
        if name not in ADAPTER_FIELDS:
            close = nearest(name, ADAPTER_FIELDS)
            raise UserError(f"{path}: unknown field {ADAPTER_KEY}.{name}{close}; a newer compressft wrote it")
    missing = sorted(ADAPTER_FIELDS - set(entry))
    if missing:
        raise UserError(f"{path}: field {ADAPTER_KEY}.{missing[0]} is missing; save the adapter again")
    if entry["format"] != ADAPTER_FORMAT:
        raise UserError(f"{path}: format {entry['format']!r}; this compressft reads {ADAPTER_FORMAT}")
    check_types(entry, "adapter", path, f"{ADAPTER_KEY}.")
    found = as_adapter(entry)
    if ADAPTER_TENSORS not in found["files"]:
        raise UserError(f"{path}: field {ADAPTER_KEY}.files does not name {ADAPTER_TENSORS}; restore the file")
    verify_files(folder, found["files"])
    return found


def _read(model: nn.Module, folder: str, manifest: Contents, who: str) -> SavedAdapter:
    parts = anatomy(model)
    file = DELTA if DELTA in manifest["files"] else ADAPTER_TENSORS
    table, stored = manifest["modules"], load_tensors(Path(folder).expanduser() / file)
    places = [f"{pfeiffer_path(layer)}.adapter" for layer in parts.layers]
    coupling = parts.path(INVERTIBLE)
    bottlenecks = {path for path, entry in table.items() if KINDS.get(str(entry["kind"]), nn.Module) is Bottleneck}
    outside = [path for path in bottlenecks if not path.startswith(tuple(places))]
    if outside or not bottlenecks or len(manifest["shapes"]) != len(parts.layers):
        raise UserError(
            f"{who}: {folder!r} holds no adapters of placement pfeiffer, one a layer; "
            "give the delta/ folder of a run with method adapter, placement pfeiffer"
        )
    pooler = parts.path(parts.family.pooler) + "." if parts.family.pooler else None
    ours = (*(f"{place}." for place in places), f"{coupling}.", *([pooler] if pooler else []))
    for name in stored:
        # Fewer rows of a table are no other rows, and ranges are no weights.
        harmless = ".quantizer." in name or (name.startswith(parts.embedding_paths) and name.endswith(ROWS))
        if name.startswith(f"{parts.prefix}.") and not name.startswith(ours) and not harmless:
            raise UserError(
                f"{who}: {folder!r} also changes {name.partition('#')[0]}, which its adapters need; "
                "give a run with method adapter and no pass that changes the model"
            )
    layers = []
    for place in places:
        found = sorted((path for path in bottlenecks if path == place or path.startswith(f"{place}.")), key=_last)
        layers.append(tuple(_filled(Bottleneck, table[path], path, stored, f"{who}: {folder!r}") for path in found))
    if not all(layers):
        raise UserError(f"{who}: {folder!r} lacks the adapters of some layers; train it again")
    invertible = (
        _filled(Invertible, table[coupling], coupling, stored, f"{who}: {folder!r}") if coupling in table else None
    )
    return SavedAdapter(folder, tuple(layers), invertible)


def _last(path: str) -> int:
    """Place of a Stack's adapter."""
    name = path.rpartition(".")[2]
    return int(name) if name.isdigit() else 0


def _filled(kind: type[Filled], entry: Mapping[str, JSON], path: str, stored: dict[str, Tensor], who: str) -> Filled:
    """The described module with its stored tensors."""
    arguments = dict(entry)
    own = {name: tensor for name, tensor in stored.items() if name.startswith(f"{path}.")}
    try:
        new = KINDS[str(arguments.pop("kind"))].rebuild(None, arguments)
        assert isinstance(new, kind)
        tensors = unpack(own, shapes={f"{path}.{name}": tensor.shape for name, tensor in new.state_dict().items()})
        new.load_state_dict({name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()})
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{who}: {path} is no module of these tensors; restore the folder") from error
    return new.requires_grad_(False)


@torch.no_grad()
def swap_adapter(model: nn.Module, folder: str, position: int = 0) -> None:
    """Put another saved adapter at one position of every layer's stack (MAD-X, step 3: another language).

    Its invertible adapter takes the place of the one that is there. Nothing else changes.

    Args:
        position: 0 is the lowest of the stack.

    Raises:
        UserError: as `read_adapters`; the model has no stack, or one of the two has an invertible adapter alone.
    """
    who = "swap_adapter"
    (saved,) = read_adapters(model, [folder], who)
    parts = anatomy(model)
    stacks = [adapter_in(model, layer) for layer in parts.layers]
    if any(len(found) != 1 for found in saved.layers):
        raise UserError(f"{who}: {folder!r} holds a stack of adapters; give a run that trained one alone")
    if any(stack is None or str(position) not in stack._modules for stack in stacks):
        raise UserError(f"{who}: the model has no stack of adapters with position {position}")
    present = getattr(parts.backbone, INVERTIBLE, None)
    if (present is None) != (saved.invertible is None):
        raise UserError(f"{who}: only one of {folder!r} and the model has an invertible adapter; give two alike")
    for stack, (new,) in zip(stacks, saved.layers, strict=True):
        assert stack is not None
        setattr(stack, str(position), new.to(stack.get_submodule(str(position)).get_parameter("up_bias").device))
    if present is not None and saved.invertible is not None:
        if present.describe() != saved.invertible.describe():
            raise UserError(f"{who}: the invertible adapters' sizes or activations differ")
        present.load_state_dict(saved.invertible.state_dict())
