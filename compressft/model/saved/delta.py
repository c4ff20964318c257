"""The `delta/` folder: only what training changed, with the hash of its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import _rebuilt, _refuse_growth, load_compressed
from compressft.model.saved.folders import MANIFEST, read_manifest, write_manifest
from compressft.model.saved.manifest import Manifest
from compressft.model.saved.sparse import pack, unpack
from compressft.model.saved.state import _class_of, _fill, _stored_shapes, layers_hash, plain_state, uniform_config
from compressft.model.shrink import shapes
from compressft.model.source import content_hash, resolve
from compressft.modules.attention import register
from compressft.modules.structure import describe
from compressft.utils.files import write_atomically
from compressft.utils.foreign import foreign, load_tensors
from compressft.utils.hub import pinned
from compressft.utils.phases import doing, phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DELTA = "delta.safetensors"


@phase("saving")
def save_delta(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    base: Mapping[str, Tensor],
    folder: Path,
    info: Mapping[str, object],
) -> None:
    """Write a `delta/` folder: only the tensors that differ from the base (by value or shape), and the base's hash.

    Each is stored in its smallest exact form (`saved.sparse`): a masked matrix is one bit a weight, a sparsely
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


def base_of(folder: Path, manifest: Manifest) -> str:
    """Where a delta's base is: what the recipe named, or the model of the stage that the delta goes on from.

    Raises:
        UserError: the stage's folder is not next to it.
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


def load_delta(folder: str | Path, base: str | None = None) -> PreTrainedModel:
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
    labels, names = values.get("num_labels"), values.get("id2label") or {}
    named = len(names) if isinstance(names, dict | list) else 0
    if labels not in (None, named):
        # The library would make up a name for each.
        raise UserError(f"{folder / MANIFEST}: config: num_labels is {labels}, id2label has {named}; restore the file")
    with foreign(f"{folder / MANIFEST}: config"):
        config = AutoConfig.for_model(str(values.pop("model_type")), **values)
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
        where, revision = pinned(source)
        model, loading = kind.from_pretrained(
            where,
            revision=revision or "main",
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    missing = set(loading["missing_keys"])
    prefix = "" if whole else f"{model.base_model_prefix}."
    return {f"{prefix}{key}": value for key, value in plain_state(model)[0].items() if key not in missing}
