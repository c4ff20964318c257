"""A model's tensors under the plain model's names, and back into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.embedder import class_named
from compressft.model.saved.folders import MANIFEST
from compressft.model.shrink import shapes
from compressft.model.source import content_hash
from compressft.modules.kinds import additions
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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


def uniform_config(model: nn.Module) -> PretrainedConfig:
    """A copy of the model's configuration that states its FFN width and heads where they are equal in all layers.

    Plain `from_pretrained` can then load the folder as far as the family's configuration can express the shape: FFN
    width always; heads and the width of the residual stream only where the family has a `head_dim` of its own.
    """
    import copy

    config = copy.deepcopy(pretrained(model).config)
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


def _class_of(architecture: str, folder: Path) -> type[PreTrainedModel]:
    kind = class_named(architecture)
    if kind is None:
        import transformers

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


def layers_hash(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Content hash of the layers' tensors alone: what an adapter was trained on, whatever head or vocabulary it had."""
    root = anatomy(model).path(anatomy(model).family.layers)
    return content_hash({name: tensor for name, tensor in tensors.items() if name.startswith(f"{root}.")})
