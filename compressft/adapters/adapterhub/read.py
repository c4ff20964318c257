"""Read folders of the `adapters` package onto a base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressft.adapters.adapterhub.arrange import held
from compressft.adapters.adapterhub.config import fields_of
from compressft.adapters.adapterhub.head import read_head
from compressft.adapters.adapterhub.names import (
    ADAPTER,
    ADAPTER_BINARY,
    ATTENTION,
    BOTTLENECK,
    FUSION,
    FUSION_BINARY,
    FUSION_CONFIG,
    INVERTIBLE,
    in_attention,
    in_fusion,
    in_invertible,
    in_output,
    in_prefix,
    known_family,
    post_norm,
    rooted,
)
from compressft.adapters.files import CONFIG, read_json, read_tensors
from compressft.adapters.settled import Settled, own_head, put, shared_copy
from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.methods.fusion import Fusion
from compressft.methods.prefix import PrefixTuning, sites
from compressft.model.anatomy import anatomy
from compressft.model.surgery import adapter_in, put_after_ffn
from compressft.modules.attention import prefix_of
from compressft.modules.bottleneck import Bottleneck
from compressft.modules.fusion import AdapterFusion
from compressft.modules.invertible import Invertible, add_invertible
from compressft.modules.prefix import Prefix
from compressft.modules.pretrained import pretrained
from compressft.transform import Context, Transform
from compressft.utils.texts import JSON

ARCHITECTURES = "bottlenecks (houlsby, pfeiffer, parallel; double_seq_bn, seq_bn, par_bn) and prefix_tuning"
# What another prefix says: the only value that is read.
PREFIX = {"leave_out": [], "use_gating": False}


def read(base: nn.Module, folder: Path) -> Settled:
    """An adapter folder on a tree of this base's tensors, with its head where it has one.

    Raises:
        UserError: a field, tensor or architecture that is not read, or of another model.
    """
    method, tree = _adapter(base, folder)
    return _with_head(base, tree, folder, method)


def _adapter(base: nn.Module, folder: Path) -> tuple[Transform, nn.Module]:
    """The adapter alone: a fusion's adapters may have heads of other shapes."""
    entry = _entry(base, folder / CONFIG)
    config = entry.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG}: config wants an object, holds {config!r}; save the adapter again")
    tensors = rooted(base, read_tensors(folder, [ADAPTER, ADAPTER_BINARY]))
    architecture = config.get("architecture")
    if architecture == "prefix_tuning":
        return _prefix(base, folder, entry["name"], config, tensors)
    if architecture is None:
        return _bottlenecks(base, folder, entry["name"], config, tensors)
    raise UserError(f"{folder / CONFIG}: config.architecture {architecture!r} is not read; {ARCHITECTURES} are")


def _entry(base: nn.Module, path: Path) -> dict[str, Any]:
    entry, config = read_json(path), base.config
    if "version" not in entry:
        raise UserError(f"{path}: has no version; load and save it once with the adapters package")
    for name in ("model_type", "hidden_size"):
        own = getattr(config, name)
        if entry.get(name) not in (None, own):
            raise UserError(f"{path}: {name} {entry[name]!r}, the model's is {own!r}; give the model it was trained on")
    if not isinstance(entry.get("name"), str) or not entry["name"]:
        raise UserError(f"{path}: name wants a string, holds {entry.get('name')!r}; tensors are stored under it")
    known_family(base, str(path))
    return entry


def _with_head(base: nn.Module, tree: nn.Module, folder: Path, method: Transform) -> Settled:
    put(tree, {}, read_head(base, folder), str(folder))
    return Settled(tree.eval(), base, method, own_head(tree, base))


def _bottlenecks(
    base: nn.Module, folder: Path, name: str, config: Mapping[str, JSON], tensors: dict[str, Tensor]
) -> tuple[Transform, nn.Module]:
    fields = fields_of(config, post_norm(base), str(folder / CONFIG))
    invertible = fields.pop("invertible")
    places, layers = known_family(base, str(folder))[0], anatomy(base).layers
    first = in_output(layers[0], places, name)
    size = _find(tensors, f"{first}{BOTTLENECK['down_bias']}", folder).shape[0]
    method = Adapter.model_validate({"size": size, **fields})
    tree = shared_copy(base)
    method.prepare(tree, Context())
    for layer in anatomy(tree).layers:
        if method.placement == "houlsby":
            _fill(held(tree, layer, layer.family.attention_out), BOTTLENECK, tensors,
                  in_attention(layer, places, name), folder)  # fmt: skip
            new = held(tree, layer, layer.family.ffn_out)
        elif method.placement == "pfeiffer":
            new = adapter_in(tree, layer)
        else:
            new = layer.module.get_submodule("parallel")
        _fill(new, BOTTLENECK, tensors, in_output(layer, places, name), folder)
    if invertible:
        root = in_invertible(base, name)
        table = pretrained(tree).get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        width = table.embedding_dim
        inner = _find(tensors, f"{root}{INVERTIBLE['f.0.bias']}", folder).shape[0]
        assert method.activation is not None
        coupling = Invertible(width, inner, method.activation)
        _fill(coupling, INVERTIBLE, tensors, root, folder)
        add_invertible(pretrained(tree), coupling)
        method = Adapter.model_validate({"size": size, "invertible": True, **fields})
    _nothing_left(tensors, folder)
    return method, tree


def _prefix(
    base: nn.Module, folder: Path, name: str, config: Mapping[str, JSON], tensors: dict[str, Tensor]
) -> tuple[Transform, nn.Module]:
    for field, value in PREFIX.items():
        if config.get(field, value) != value:
            raise UserError(f"{folder / CONFIG}: config.{field} {config[field]!r} is not read; {value!r} is")
    places, length = list(sites(base)), config.get("prefix_length")
    if type(length) is not int or length < 1:
        raise UserError(f"{folder / CONFIG}: config.prefix_length wants a number from 1, holds {length!r}; restore it")
    flat = _flat(base, folder, name, config, tensors)
    site = places[0]
    wanted = length * 2 * len(places) * site.heads * site.size
    if flat.numel() != wanted:
        raise UserError(f"{folder}: its prefix has {flat.numel()} values, the model wants {wanted}")
    method = PrefixTuning(length=length, reparameterise=False, shift_positions=False)
    tree = shared_copy(base)
    method.prepare(tree, Context())
    pairs = flat.view(length, 2 * len(places), site.heads, site.size).permute(1, 2, 0, 3)
    with torch.no_grad():
        for number, place in enumerate(sites(tree)):
            front = prefix_of(place.module)
            assert isinstance(front, Prefix)
            front.key.copy_(pairs[2 * number])
            front.value.copy_(pairs[2 * number + 1])
    _nothing_left(tensors, folder)
    return method, tree


def _flat(base: nn.Module, folder: Path, name: str, config: Mapping[str, JSON], tensors: dict[str, Tensor]) -> Tensor:
    """Keys and values of all layers, one virtual token after the other: the reparameterisation is worked out here."""
    root = in_prefix(base, known_family(base, str(folder))[1], name)
    if config.get("flat"):
        return _take(tensors, f"{root}control_trans", folder)
    if config.get("non_linearity", "tanh") != "tanh":
        raise UserError(f"{folder / CONFIG}: config.non_linearity {config['non_linearity']!r} is not read; 'tanh' is")
    table = _take(tensors, f"{root}wte.weight", folder)
    inner = [_take(tensors, f"{root}control_trans.0.{part}", folder) for part in ("weight", "bias")]
    outer = [_take(tensors, f"{root}control_trans.2.{part}", folder) for part in ("weight", "bias")]
    hidden = torch.tanh(nn.functional.linear(table, *inner))
    return nn.functional.linear(hidden, *outer)


def read_fusion(base: nn.Module, folder: Path) -> Settled:
    """A fusion folder and the folders of its adapters, inside it or next to it, on a tree of this base's tensors.

    Raises:
        UserError: as `read`; an adapter's folder is not there.
    """
    path = folder / FUSION_CONFIG
    entry = _entry(base, path)
    _check_fusion(entry.get("config"), path)
    name, names = entry["name"], entry.get("adapter_names") or entry["name"]
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise UserError(f"{path}: adapter_names wants a list of strings, holds {names!r}")
    homes = [_home(folder, one) for one in names]
    parts = [_pfeiffer(base, home, path) for home in homes]
    activations = sorted({part[0].activation for part in parts})
    if len(activations) > 1:
        raise UserError(f"{path}: its adapters have activations {', '.join(activations)}; fusions of one are read")
    tensors = rooted(base, read_tensors(folder, [FUSION, FUSION_BINARY]))
    places = known_family(base, str(path))[0]
    tree = shared_copy(base)
    tree.requires_grad_(False)
    for layer in anatomy(tree).layers:
        new = AdapterFusion.of([part[layer.index] for part in parts], 0.0, torch.Generator().manual_seed(0))
        _fill(new, ATTENTION, tensors, in_fusion(layer, places, name), folder)
        put_after_ffn(tree, layer, new)
    _nothing_left(tensors, folder)
    return _with_head(base, tree, folder, Fusion(adapters=tuple(map(str, homes))))


def _check_fusion(config: object, path: Path) -> None:
    if not isinstance(config, dict):
        raise UserError(f"{path}: config wants an object, holds {config!r}")
    only = {"key": True, "query": True, "value": True, "query_before_ln": False, "residual_before": False}
    # A temperature falls with every call there, and is not saved.
    for name, value in {**only, "temperature": False}.items():
        if config.get(name, value) != value:
            raise UserError(f"{path}: config.{name} {config[name]!r} is not read; {value!r} is")


def _home(folder: Path, name: str) -> Path:
    for home in (folder / name, folder.parent / name):
        if (home / CONFIG).is_file():
            return home
    raise UserError(
        f"{folder}: its adapter {name!r} is neither in {folder / name} nor in {folder.parent / name}; "
        "save it there (save_all_adapters does)"
    )


def _pfeiffer(base: nn.Module, home: Path, path: Path) -> list[Bottleneck]:
    tree = _adapter(base, home)[1]
    found = [adapter_in(tree, layer) for layer in anatomy(tree).layers]
    kept = [adapter for adapter in found if isinstance(adapter, Bottleneck)]
    if len(kept) != len(found) or kept[0].scale != 1.0:
        raise UserError(f"{path}: its adapter {home.name!r} is no seq_bn of scaling 1, which fusions are read of")
    return kept


def _fill(
    module: nn.Module | None, names: Mapping[str, str], tensors: dict[str, Tensor], prefix: str, folder: Path
) -> None:
    """Copy a module's tensors from theirs, which are taken out of `tensors`."""
    assert module is not None
    own = dict(module.named_parameters())
    with torch.no_grad():
        for ours, theirs in names.items():
            value = _take(tensors, prefix + theirs, folder)
            if value.shape != own[ours].shape:
                shapes = f"has shape {tuple(value.shape)}, wants {tuple(own[ours].shape)}"
                raise UserError(f"{folder}: tensor {prefix + theirs!r} {shapes}")
            own[ours].copy_(value)


def _find(tensors: Mapping[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder}: tensor {name!r} is missing")
    return tensors[name]


def _take(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    _find(tensors, name, folder)
    return tensors.pop(name)


def _nothing_left(tensors: Mapping[str, Tensor], folder: Path) -> None:
    if tensors:
        raise UserError(f"{folder}: tensor {min(tensors)!r} has no place here")
