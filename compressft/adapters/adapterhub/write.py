"""Write folders that the `adapters` package loads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.adapters.adapterhub.arrange import Arrangement, arrangement
from compressft.adapters.adapterhub.config import config_of
from compressft.adapters.adapterhub.head import write_head
from compressft.adapters.adapterhub.names import (
    ADAPTER,
    ATTENTION,
    BOTTLENECK,
    FUSION,
    FUSION_CONFIG,
    INVERTIBLE,
    in_attention,
    in_fusion,
    in_invertible,
    in_output,
    in_prefix,
    known_family,
    post_norm,
)
from compressft.adapters.files import CONFIG, write_json, write_tensors
from compressft.adapters.settled import Settled
from compressft.model.anatomy import anatomy
from compressft.modules.bottleneck import BottleneckDesign
from compressft.modules.fusion import AdapterFusion
from compressft.modules.pretrained import pretrained
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adapter_name(folder: Path) -> str:
    """What the adapter in a folder is called there: its name with "_" for what module names cannot have."""
    return re.sub(r"[^\w-]", "_", folder.name) or "adapter"


def write(settled: Settled, folder: Path) -> None:
    """Write an adapter's folder, or a fusion's with its adapters' inside; `arrange.refusal` had no objection."""
    found = arrangement(settled.model)
    assert found is not None
    if found.fusions:
        _write_fusion(settled, folder, found.fusions)
        return
    name = adapter_name(folder)
    if found.prefixes:
        config, tensors = _prefix(settled.plain, found, name)
    else:
        config, tensors = _bottlenecks(settled.plain, found, name)
    _write(settled.plain, folder, name, config, tensors)
    write_head(settled, folder, name)


def _common(model: PreTrainedModel, name: str) -> dict[str, JSON]:
    return {
        "hidden_size": model.config.hidden_size,
        "model_class": type(model).__name__,
        "model_name": str(getattr(model, "name_or_path", "") or ""),
        "model_type": model.config.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }


def _write(
    model: nn.Module, folder: Path, name: str, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / ADAPTER, tensors)
    write_json(folder / CONFIG, {**_common(pretrained(model), name), "config": config})


def _bottlenecks(model: nn.Module, found: Arrangement, name: str) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    assert found.placement is not None
    places = known_family(model, "")[0]
    tensors: dict[str, Tensor] = {}
    output = found.bottlenecks[0][-1]
    for layer, (*attention, output) in zip(anatomy(model).layers, found.bottlenecks, strict=True):
        for module in attention:
            tensors |= _named(module, BOTTLENECK, in_attention(layer, places, name))
        tensors |= _named(output, BOTTLENECK, in_output(layer, places, name))
    size, width = output.down_weight.shape
    inner = None
    if found.invertible is not None:
        # Embeddings may be narrower than the layers.
        inner = found.invertible.first, found.invertible.size
        tensors |= _named(found.invertible, INVERTIBLE, in_invertible(model, name))
    design = BottleneckDesign(width, size, output.activation, output.scale)
    config = config_of(found.placement, design, post_norm(model), inner)
    return config, tensors


def _named(module: nn.Module, names: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    own = dict(module.named_parameters())
    return {prefix + theirs: own[ours] for ours, theirs in names.items()}


def _prefix(model: nn.Module, found: Arrangement, name: str) -> tuple[dict[str, JSON], dict[str, Tensor]]:
    pairs = torch.stack([tensor.detach() for front in found.prefixes for tensor in (front.key, front.value)])
    length = pairs.shape[2]
    config: dict[str, JSON] = {
        "architecture": "prefix_tuning",
        "flat": True,
        "prefix_length": length,
        "bottleneck_size": 512,
        "non_linearity": "tanh",
        "dropout": 0.0,
        "encoder_prefix": True,
        "cross_prefix": True,
        "leave_out": [],
        "use_gating": False,
        "shared_gating": True,
    }
    root = in_prefix(model, known_family(model, "")[1], name)
    return config, {f"{root}control_trans": pairs.permute(2, 0, 1, 3).reshape(-1)}


def _write_fusion(settled: Settled, folder: Path, layers: tuple[AdapterFusion, ...]) -> None:
    """The fusion's own tensors, and one folder for each adapter, named by its number."""
    model = settled.plain
    places = known_family(model, "")[0]
    names = [f"{adapter_name(folder)}_{number}" for number in range(len(layers[0].sizes))]
    for number, name in enumerate(names):
        tensors: dict[str, Tensor] = {}
        for layer, fusion in zip(anatomy(model).layers, layers, strict=True):
            parts = _part(fusion, number)
            prefix = in_output(layer, places, name)
            tensors |= {prefix + theirs: parts[ours] for ours, theirs in BOTTLENECK.items()}
        size, width = _part(layers[0], number)["down_weight"].shape
        design = BottleneckDesign(width, size, layers[0].activation)
        config = config_of("pfeiffer", design, post_norm(model), None)
        _write(model, folder / name, name, config, tensors)
    joined = ",".join(names)
    tensors = {}
    for layer, fusion in zip(anatomy(model).layers, layers, strict=True):
        tensors |= _named(fusion, ATTENTION, in_fusion(layer, places, joined))
    config = {
        "key": True,
        "query": True,
        "value": True,
        "query_before_ln": False,
        "regularization": True,
        "residual_before": False,
        "temperature": False,
        "value_before_softmax": True,
        "value_initialized": True,
        "dropout_prob": layers[0].dropout or None,
    }
    write_tensors(folder / FUSION, tensors)
    write_json(folder / FUSION_CONFIG, {**_common(pretrained(model), joined), "adapter_names": names, "config": config})
    write_head(settled, folder, joined)


def _part(fusion: AdapterFusion, number: int) -> dict[str, Tensor]:
    """The tensors of one of a fusion's adapters."""
    rows = slice(sum(fusion.sizes[:number]), sum(fusion.sizes[: number + 1]))
    return {
        "down_weight": fusion.down_weight[rows],
        "down_bias": fusion.down_bias[rows],
        "up_weight": fusion.up_weight[:, rows],
        "up_bias": fusion.up_bias[number],
    }
