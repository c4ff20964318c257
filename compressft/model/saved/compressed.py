"""Delta and compressed model folders: safetensors and JSON only, content hashes, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.saved.folders import MANIFEST, read_manifest, write_manifest
from compressft.model.saved.manifest import Manifest
from compressft.model.saved.parts import MOST
from compressft.model.saved.sentence import opens_elsewhere, write_modules
from compressft.model.saved.state import _class_of, _fill, plain_state, uniform_config
from compressft.model.shrink import resize, shapes
from compressft.model.source import resolve
from compressft.modules.attention import TRAINING, register
from compressft.modules.dropout import quicken
from compressft.modules.structure import describe, rebuild
from compressft.utils.files import write_atomically
from compressft.utils.foreign import foreign, load_config, load_tensors
from compressft.utils.phases import phase

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "model.safetensors"
EXTRA = "compressft.safetensors"


@phase("saving")
def save_compressed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    info: Mapping[str, object],
    also: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a `model/` folder: Hugging Face layout with the real shapes, what only we know in files of our own.

    Args:
        info: recorded in the manifest (task, labels, ...), so that the folder can be evaluated on its own.
        also: further tensors by the name of their file, which loading the model does not read.
    """
    from safetensors.torch import save_file

    def write(target: Path) -> None:
        plain, extra = plain_state(model)
        save_file(plain, target / WEIGHTS, metadata={"format": "pt"})
        if extra:
            save_file(extra, target / EXTRA, metadata={"format": "pt"})
        for name, tensors in (also or {}).items():
            save_file({key: value.contiguous() for key, value in tensors.items()}, target / name)
        config = uniform_config(model)
        config.save_pretrained(target)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
            if opens_elsewhere(model, config, plain | extra):
                write_modules(target, config, anatomy(model).width, info.get("max_length"))
        manifest = {
            "architecture": type(model).__name__,
            "shapes": shapes(model),
            "width": anatomy(model).width,
            "modules": describe(model),
            **info,
        }
        write_manifest(target, "model", manifest)

    write_atomically(folder, write)


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


def _rebuilt(config: PretrainedConfig, manifest: Manifest, folder: Path, stored: int) -> PreTrainedModel:
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

    def build() -> PreTrainedModel:
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


def _refuse_growth(
    config: PretrainedConfig, kind: type[PreTrainedModel], base: str, tensors: Mapping[str, Tensor], where: str
) -> None:
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


def _planned(kind: type[PreTrainedModel], config: PretrainedConfig, where: str) -> dict[str, torch.Size]:
    """Shapes of a model that is not built."""
    with foreign(f"{where}: no {kind.__name__} could be built from it"), torch.device("meta"):
        model = kind._from_config(config, attn_implementation=TRAINING, dtype=torch.float32)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
