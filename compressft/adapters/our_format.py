"""Our own adapter folder: the method's fields, which modules are where, and what differs from the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from compressft.adapters.files import CONFIG, KEY, TENSORS, read_tensors, write_json, write_tensors
from compressft.adapters.settled import Settled, of_backbone, origin, own_head, put, shared_copy
from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.model.anatomy import anatomy
from compressft.model.saved.adapters import ADAPTER_FORMAT, adapter_entry
from compressft.model.saved.delta import DELTA
from compressft.model.saved.folders import MANIFEST, read_manifest
from compressft.model.saved.manifest import AdapterContents, Contents, Manifest
from compressft.model.saved.sparse import VALUES, pack, unpack
from compressft.model.saved.state import layers_hash, plain_state
from compressft.model.shrink import resize, shapes
from compressft.model.source import content_hash
from compressft.modules.lsh import Lsh, without_cache
from compressft.modules.pretrained import pretrained
from compressft.modules.structure import describe
from compressft.recipe.document import refuse_edited
from compressft.recipe.program import parse_member
from compressft.recipe.recipe import parse_recipe
from compressft.transform import Transform
from compressft.utils.files import file_hash
from compressft.utils.strict_yaml import read_yaml
from compressft.utils.texts import JSON, read_text


def refusal(settled: Settled) -> str | None:
    """Why this cannot be saved, or None."""
    if settled.method is None:
        return "the delta/ folder does not say which method made it; give the run directory, with its recipe.yaml"
    return None


def write(settled: Settled, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Tensors are stored as in `delta/`, each in its smallest exact form against the base's (`saved.sparse`), but the
    head's, which are whole: another base's head holds other values.

    `refusal` must have had no objection.
    """
    assert settled.method is not None
    base = {name: tensor for name, tensor in settled.base.items() if name not in settled.head}
    packed = pack(settled.changed, base)
    model = pretrained(settled.model)
    write_tensors(folder / TENSORS, packed)
    labels = model.config.id2label
    assert labels is not None
    entry = {
        "format": ADAPTER_FORMAT,
        "kind": "adapter",
        "method": settled.method.model_dump(mode="json"),
        "base": origin(settled.plain),
        "architecture": type(settled.plain).__name__,
        "labels": {str(number): label for number, label in labels.items()},
        "layers_hash": layers_hash(settled.plain, settled.base),
        "origin_hash": _origin_hash(packed, base),
        "shapes": shapes(model),
        "modules": describe(model),
        "files": {TENSORS: file_hash(folder / TENSORS)},
    }
    write_json(folder / CONFIG, {KEY: entry})


def _relative(packed: Mapping[str, Tensor]) -> set[str]:
    """Names whose stored form is a difference to the base."""
    coded = {key.partition("#")[0] for key in packed if "#" in key}
    return {name for name in coded if name + VALUES not in packed}


def _origin_hash(packed: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> str | None:
    names = _relative(packed)
    return content_hash({name: base[name] for name in names}) if names else None


def manifest(folder: Path) -> AdapterContents:
    """What `adapter_config.json` says under our key, its files compared with their hashes.

    Raises:
        UserError: as `adapter_entry`; it is another package's.
    """
    entry = adapter_entry(folder)
    if entry is None:
        raise UserError(f"{folder / CONFIG}: has no {KEY!r}; give an adapter folder that compressft wrote")
    return entry


def read(base: nn.Module, folder: Path) -> Settled:
    """The adapter on a tree of this base's tensors.

    Raises:
        UserError: it was made on another base; a file, field or tensor is missing, changed, unknown or has another
            shape.
    """
    entry = manifest(folder)
    tensors = plain_state(base)[0]
    if layers_hash(base, tensors) != entry["layers_hash"]:
        raise UserError(_another(folder, entry["base"], entry["architecture"]))
    packed = read_tensors(folder, [TENSORS])
    lacking = sorted(_relative(packed) - set(tensors))
    if lacking or _origin_hash(packed, tensors) != entry["origin_hash"]:
        raise UserError(_another(folder, entry["base"], entry["architecture"]))
    changed = unpack(packed, tensors, where=str(folder / TENSORS))
    return _settle(base, folder, parse_method(entry["method"], folder), entry, changed)


def parse_method(fields: Mapping[str, JSON], folder: Path) -> Transform:
    """A method from its stored fields.

    Raises:
        UserError: an unknown method or field.
    """
    try:
        return parse_member(fields, METHODS, "method")
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def read_delta(base: nn.Module, folder: Path) -> Settled:
    """A run's `delta/` folder as an adapter on a tree of this base's tensors; the method is the run's last stage's.

    Raises:
        UserError: as `read`; the run changed the number of layers or their width.
    """
    entry = read_manifest(folder, "delta")
    if "layers_hash" not in entry:
        raise UserError(f"{folder / MANIFEST}: was written before adapters could be read; train it again")
    tensors = plain_state(base)[0]
    packed = read_tensors(folder, [DELTA])
    relative = _relative(packed)
    inside = f"{anatomy(base).path(anatomy(base).family.layers)}."
    outside = any(not name.startswith(inside) for name in relative)
    same = layers_hash(base, tensors) == entry["layers_hash"] and relative <= set(tensors)
    if not same or (outside and entry["base_hash"] not in _pretrained_hashes(base, tensors)):
        raise UserError(_another(folder, entry.get("model", ""), entry["architecture"]))
    changed = unpack(packed, tensors, where=str(folder / DELTA))
    return _settle(base, folder, _method_of_run(folder, entry), entry, changed)


def _pretrained_hashes(base: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Hashes that `base_tensors` may have given for this model, whose pooler may be pretrained or not."""
    if pretrained(base).get_output_embeddings() is not None:
        # A language model's output layer is pretrained too.
        return {content_hash(tensors)}
    parts = anatomy(base)
    backbone = {name: tensor for name, tensor in tensors.items() if of_backbone(base, name)}
    pooler = parts.path(parts.family.pooler) + "." if parts.family.pooler else None
    bare = {name: tensor for name, tensor in backbone.items() if pooler is None or not name.startswith(pooler)}
    return {content_hash(backbone), content_hash(bare)}


def _method_of_run(folder: Path, entry: Manifest) -> Transform | None:
    recipe = folder.parent / "recipe.yaml"
    if not recipe.is_file():
        return None
    refuse_edited(recipe, entry.get("recipe_hash"))
    return parse_recipe(read_yaml(read_text(recipe), str(recipe)), str(recipe)).stages[-1].method


def _settle(
    base: nn.Module, folder: Path, method: Transform | None, entry: Contents, tensors: Mapping[str, Tensor]
) -> Settled:
    tree = shared_copy(base)
    if len(entry["shapes"]) != len(shapes(tree)) or entry.get("width") not in (None, anatomy(tree).width):
        raise UserError(
            f"{folder}: its run changed the number of layers or their width, which an adapter cannot; "
            "load it with load_compressed or load_delta"
        )
    if entry["shapes"] != shapes(tree):
        resize(tree, entry["shapes"], who=str(folder))
    put(tree, entry["modules"], tensors, str(folder))
    if any(isinstance(module, Lsh) for module in tree.modules()):
        without_cache(tree)
    return Settled(tree.eval(), base, method, own_head(tree, base))


def _another(folder: Path, name: str, architecture: str) -> str:
    return (
        f"{folder}: was made on another base than the model here (content hashes differ); "
        f"give {name or 'the one it was trained on'}, loaded as {architecture}"
    )
