"""Delta and compressed model folders: safetensors and JSON only, content hashes, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressft.anatomy import anatomy
from compressft.errors import UserError
from compressft.foreign import foreign, load_config, load_tensors
from compressft.manifest import FORMAT, check_manifest, compare_labels, require, sealed
from compressft.model import content_hash, resolve
from compressft.modules.attention import TRAINING, register
from compressft.modules.dropout import quicken
from compressft.modules.kinds import additions
from compressft.modules.linear import CompressedLinear
from compressft.modules.structure import describe, rebuild
from compressft.parts import MOST
from compressft.phases import doing, phase, steps
from compressft.shrink import resize, shapes
from compressft.sparse import pack, unpack
from compressft.texts import read_json

MANIFEST = "compressft.json"
WEIGHTS = "model.safetensors"
EXTRA = "compressft.safetensors"
DELTA = "delta.safetensors"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; computed anew where its size or time of change is another."""
    state = path.stat()
    # The time of change of the inode cannot be set back, that of the content can.
    return _hash(path.resolve(), state.st_size, (state.st_mtime_ns, state.st_ctime_ns), state.st_ino)


@lru_cache(maxsize=1024)
def _hash(path: Path, size: int, changed: tuple[int, int], number: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(folder: Path, write: Any) -> None:
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
        if os.name == "nt" and path.is_dir():
            # Windows cannot open directories.
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def hash_files(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder but the manifest, by relative path."""
    return {
        str(path.relative_to(folder)): file_hash(path)
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


def write_manifest(folder: Path, kind: str, entry: Mapping[str, Any]) -> None:
    """Write `compressft.json` beside files that are all there: with their hashes, and its own."""
    whole = {"format": FORMAT, "kind": kind, **entry, "files": hash_files(folder)}
    (folder / MANIFEST).write_text(json.dumps(sealed(whole), indent=1), encoding="utf-8")


def read_manifest(
    folder: str | Path, kind: str | None = None, also: Iterable[str] = (), files: bool = True
) -> dict[str, Any]:
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


def plain_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights under the plain model's names and layouts, tensors that only our modules have); tied copies dropped."""
    plain: dict[str, Tensor] = {}
    extra: dict[str, Tensor] = {}
    transposed = {
        f"{path}.weight" for path, m in model.named_modules() if isinstance(m, CompressedLinear) and m.transposed
    }
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    added = additions(model)
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() > 1 and key in seen:
            continue
        seen[key] = name
        ours = name.startswith(added)
        name = name.replace(".inner.", ".")
        value = tensor.detach().cpu()
        (extra if ours else plain)[name] = (value.t() if name in transposed else value).contiguous()
    return plain, extra


@phase("saving")
def save_compressed(model: nn.Module, tokenizer: Any, folder: Path, info: Mapping[str, Any]) -> None:
    """Write a `model/` folder: Hugging Face layout with the real shapes, what only we know in files of our own.

    Args:
        info: recorded in the manifest (task, labels, ...), so that the folder can be evaluated on its own.
    """
    from safetensors.torch import save_file

    def write(target: Path) -> None:
        plain, extra = plain_state(model)
        save_file(plain, target / WEIGHTS, metadata={"format": "pt"})
        if extra:
            save_file(extra, target / EXTRA, metadata={"format": "pt"})
        uniform_config(model).save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        manifest = {
            "architecture": type(model).__name__,
            "shapes": shapes(model),
            "width": anatomy(model).width,
            "modules": describe(model),
            **info,
        }
        write_manifest(target, "model", manifest)

    write_atomically(folder, write)


def uniform_config(model: nn.Module) -> Any:
    """A copy of the model's configuration that states its FFN width and heads where they are equal in all layers.

    Plain `from_pretrained` can then load the folder as far as the family's configuration can express the shape: FFN
    width always; heads and the width of the residual stream only where the family has a `head_dim` of its own.
    """
    import copy

    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    present = shapes(model)
    if all(shape["ffn"] == present[0]["ffn"] for shape in present):
        for name in ("intermediate_size", "hidden_dim", "n_inner"):
            if hasattr(config, name) and name in config.to_dict():
                setattr(config, name, present[0]["ffn"])
    names = ("head_dim", "num_attention_heads", "num_key_value_heads", "hidden_size")
    stated = {name: getattr(config, name, None) for name in names}
    if all(shape["heads"] == present[0]["heads"] for shape in present) and stated["head_dim"]:
        config.num_attention_heads = present[0]["heads"]
        if stated["num_key_value_heads"]:
            config.num_key_value_heads = present[0]["kv_heads"]
    parts = anatomy(model)
    if parts.family.own_head_size and parts.width != stated["hidden_size"]:
        config.head_dim, config.hidden_size = parts.layers[0].head_dim, parts.width
    try:
        getattr(config, "validate_architecture", lambda: None)()
    except ValueError:
        # Llama refuses a width that is no multiple of the number of heads, needlessly where head_dim is stated.
        for name, value in stated.items():
            if hasattr(config, name):
                setattr(config, name, value)
    return config


def load_compressed(folder: str | Path) -> Any:
    """Load a `model/` folder of ours: rebuilt from its per-layer shapes, in eval mode, on the CPU in fp32.

    Raises:
        UserError: the folder is incomplete, or a file is not what was written (by hash).
    """
    folder = Path(folder)
    manifest = read_manifest(folder, "model")
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing; the folder is incomplete")
    tensors = load_tensors(folder / WEIGHTS)
    if (folder / EXTRA).is_file():
        tensors |= load_tensors(folder / EXTRA)
    model = _rebuilt(load_config(folder, str(folder)), manifest, folder, sum(t.numel() for t in tensors.values()))
    _fill(model, tensors)
    unused = sorted(set(tensors) - {name.replace(".inner.", ".") for name in model.state_dict()})
    if unused:
        raise UserError(f"{folder}: tensor {unused[0]!r} has no place in a {manifest['architecture']}; train it again")
    return model.eval()


def _rebuilt(config: Any, manifest: Mapping[str, Any], folder: Path, stored: int) -> Any:
    """A random model of a manifest's class, shapes and modules.

    Args:
        stored: entries of the tensors that will fill it. What wants far more is refused before it is allocated.
    """
    register()
    kind = _class_of(manifest["architecture"], folder)
    wanted = getattr(kind.config_class, "model_type", config.model_type)
    if config.model_type != wanted:
        raise UserError(
            f"{folder / MANIFEST}: architecture {manifest['architecture']!r} is of family {wanted!r}, "
            f"the configuration of {config.model_type!r}; restore the folder"
        )

    def build() -> Any:
        with foreign(f"{folder}: a {manifest['architecture']} could not be built from its configuration"):
            model = kind._from_config(config, attn_implementation=TRAINING, dtype=torch.float32)
        resize(model, manifest["shapes"], manifest.get("width"), str(folder / MANIFEST))
        rebuild(model, manifest["modules"], str(folder / MANIFEST))
        return model

    with torch.device("meta"):
        wanted = sum(t.numel() for t in build().state_dict().values())
    # A tied table is stored once and wanted twice.
    if wanted > 2 * stored + MOST:
        raise UserError(f"{folder}: wants {wanted:,} entries, {stored:,} are stored; restore the folder")
    model = build()
    # As `load_model` does: a resumed run draws what the uninterrupted one draws.
    quicken(model)
    return model


def _refuse_growth(config: Any, kind: Any, base: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a configuration of a larger model than the base's own, before anything of it is allocated.

    Args:
        kind: the class that both are of.
        base: where the base is.
        tensors: the base's.
        where: begins the messages.

    Raises:
        UserError: a tensor would be larger than the base's of its name, or the others together than the whole base.
    """
    own = load_config(resolve(base))
    layers, most = (getattr(one, "num_hidden_layers", 0) for one in (config, own))
    if layers > most:
        raise UserError(f"{where}: wants {layers:,} layers, the base has {most}; restore the folder")
    wanted, has = (_planned(kind, one, where) for one in (config, own))
    for name in tensors.keys() & wanted.keys() & has.keys():
        if any(new > old for new, old in zip(wanted[name], has[name], strict=True)):
            raise UserError(f"{where}: {name!r} would be {tuple(wanted[name])}, the base's is {tuple(has[name])}")
    new = sum(shape.numel() for name, shape in wanted.items() if name not in tensors)
    if new > max(MOST, sum(shape.numel() for shape in has.values())):
        raise UserError(f"{where}: wants {new:,} entries that the base lacks, more than it has; restore the folder")


def _planned(kind: Any, config: Any, where: str) -> dict[str, torch.Size]:
    """Shapes of a model that is not built."""
    with foreign(f"{where}: no {kind.__name__} could be built from it"), torch.device("meta"):
        model = kind._from_config(config, attn_implementation=TRAINING, dtype=torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _class_of(architecture: str, folder: Path) -> Any:
    import transformers

    kind = getattr(transformers, architecture, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UserError(
            f"{folder / MANIFEST}: architecture {architecture!r} is no model class of this transformers "
            f"({transformers.__version__}); restore the file or install the version that has it"
        )
    return kind


def _transposed(model: nn.Module) -> set[str]:
    """Names of the weights that files hold the other way round."""
    return {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, CompressedLinear) and m.transposed}


def _stored_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of all tensors that a model wants, as files name and hold them."""
    turned = _transposed(model)
    return {
        name.replace(".inner.", "."): tensor.t().shape if name in turned else tensor.shape
        for name, tensor in model.state_dict().items()
    }


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    transposed = _transposed(model)
    with torch.no_grad():
        for name, target in own.items():
            source = tensors.get(name.replace(".inner.", "."))
            if source is None:
                # A tied copy is stored once, under its first name.
                if any(target.data_ptr() == other.data_ptr() for key, other in own.items() if key in tensors):
                    continue
                raise UserError(f"model: tensor {name!r} is not in the folder")
            source = source.t() if name in transposed else source
            if source.shape != target.shape:
                raise UserError(f"model: tensor {name!r} has shape {tuple(source.shape)}, wants {tuple(target.shape)}")
            target.copy_(source)


@phase("saving")
def save_delta(
    model: nn.Module, tokenizer: Any, base: Mapping[str, Tensor], folder: Path, info: Mapping[str, Any]
) -> None:
    """Write a `delta/` folder: only the tensors that differ from the base (by value or shape), and the base's hash.

    Each is stored in its smallest exact form (`compressft.sparse`): a masked matrix is one bit a weight, a sparsely
    changed one its new values and where they are, rows of the base's are their numbers.

    Args:
        base: `base_tensors` of the model that training started from, or of an earlier stage's ("from_stage").
        info: recorded in the manifest; "model" names the base for `load_delta`.
    """
    from safetensors.torch import save_file

    def write(target: Path) -> None:
        plain, extra = plain_state(model)
        changed = {
            name: tensor
            for name, tensor in (plain | extra).items()
            if name not in base or base[name].shape != tensor.shape or not torch.equal(base[name], tensor)
        }
        with doing("comparing with the base"):
            save_file(pack(changed, base), target / DELTA, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        manifest = {
            "architecture": type(model).__name__,
            "base_hash": content_hash(base),
            "layers_hash": layers_hash(model, base),
            "config": json.loads(uniform_config(model).to_json_string(use_diff=False)),
            "shapes": shapes(model),
            "width": anatomy(model).width,
            "modules": describe(model),
            **info,
        }
        write_manifest(target, "delta", manifest)

    write_atomically(folder, write)


def layers_hash(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Content hash of the layers' tensors alone: what an adapter was trained on, whatever head or vocabulary it had."""
    root = anatomy(model).path(anatomy(model).family.layers)
    return content_hash({name: tensor for name, tensor in tensors.items() if name.startswith(f"{root}.")})


def base_of(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Where a delta's base is: what the recipe named, or the model of the stage that the delta goes on from.

    Raises:
        UserError: the stage's folder is not beside it.
    """
    stage = manifest.get("from_stage")
    if stage is None:
        return manifest["model"]
    beside = folder.parent / "stages" / stage
    if not beside.is_dir():
        raise UserError(
            f"{folder}: goes on from the model of stage {stage!r}; give it as the base, or put it at {beside}"
        )
    return str(beside)


def load_delta(folder: str | Path, base: str | None = None) -> Any:
    """Rebuild the task's model from its base and a `delta/` folder.

    Args:
        base: where the base is now (default: where `base_of` finds it).

    Raises:
        UserError: a file is damaged, or the base is not the one the delta was made on.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    manifest = read_manifest(folder, "delta", () if base else ("model",))
    if not (folder / DELTA).is_file():
        raise UserError(f"{folder / DELTA}: is missing; the folder is incomplete")
    kind = _class_of(manifest["architecture"], folder)
    name = base or base_of(folder, manifest)
    tensors = base_tensors(name, manifest["architecture"])
    if content_hash(tensors) != manifest["base_hash"]:
        raise UserError(
            f"{folder}: was made on another base than {name!r} (content hashes differ); give the right base"
        )
    values = dict(manifest["config"])
    labels, named = values.get("num_labels"), len(values.get("id2label") or ())
    if labels not in (None, named):
        # The library would make up a name for each.
        raise UserError(f"{folder / MANIFEST}: config: num_labels is {labels}, id2label has {named}; restore the file")
    with foreign(f"{folder / MANIFEST}: config"):
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    _refuse_growth(config, kind, name, tensors, f"{folder / MANIFEST}: config")
    model = _rebuilt(config, manifest, folder, sum(t.numel() for t in tensors.values()))
    changed = unpack(load_tensors(folder / DELTA), tensors, _stored_shapes(model), str(folder / DELTA))
    _fill(model, {**tensors, **changed})
    return model.eval()


def base_tensors(name: str, architecture: str = "AutoModel") -> dict[str, Tensor]:
    """The pretrained tensors of a base model under the names they have inside a model of this architecture.

    A causal language model's output layer is among them, a classifier's head is not: nor is any tensor that the
    checkpoint lacks (and transformers would draw at random).
    """
    source = resolve(name)
    if (Path(source) / MANIFEST).is_file():
        plain, extra = plain_state(load_compressed(source))
        return plain | extra
    register()
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind = getattr(transformers, architecture) if whole else transformers.AutoModel
    with foreign(f"model: {name!r} could not be loaded"):
        model, loading = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    missing = set(loading["missing_keys"])
    prefix = "" if whole else f"{model.base_model_prefix}."
    return {f"{prefix}{key}": value for key, value in plain_state(model)[0].items() if key not in missing}
