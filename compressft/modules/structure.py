"""Describe which of our modules sit where in a model, and put them back: what a saved folder needs beside tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from compressft.modules.bottleneck import AdaptedNorm, AdaptedOutput, Bottleneck
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.int4 import Grid
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import QUANTIZERS, Int4Quantizer, Int8Quantizer, Quantizer


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module path -> {"kind", ...} for every module of ours; gates and deltas must have been folded.

    Raises:
        ValueError: gates or a delta are still in place.
    """
    table: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            if len(module.gates) or module.delta is not None:
                raise ValueError(f"{path}: gates or delta are not folded; call the transforms' finalize first")
            if module.store is not None:
                raise ValueError(f"{path}: the weight is still packed; call the transforms' finalize first")
            entry: dict[str, Any] = {"kind": "linear"}
            if module.quantizer is not None:
                entry["quantizer"] = _quantizer(module.quantizer)
            if isinstance(module.adapter, Bottleneck):
                entry["adapter"] = _bottleneck(module.adapter)
            table[path] = entry
        elif isinstance(module, CompressedEmbedding):
            table[path] = {"kind": "embedding", "bits": module.bits, "block": module.block}
        elif isinstance(module, AdaptedOutput):
            table[path] = {"kind": "adapted_output", "adapter": _bottleneck(module.adapter)}
        elif isinstance(module, AdaptedNorm):
            table[path] = {"kind": "adapted_norm", "adapter": _bottleneck(module.adapter)}
    return table


def _bottleneck(adapter: Bottleneck) -> dict[str, Any]:
    size, width = adapter.down_weight.shape
    return {"width": width, "size": size, "activation": adapter.activation}


def _quantizer(quantizer: Quantizer) -> dict[str, Any]:
    entry = {"kind": quantizer.kind, **quantizer.describe()}
    if isinstance(quantizer, Int4Quantizer) and quantizer.scale is not None:
        entry["grid"] = list(quantizer.scale.shape)
    return entry


def _build_quantizer(entry: dict[str, Any], path: str) -> Quantizer:
    arguments = dict(entry)
    if "dynamic" in arguments:
        # As folders say it that were written before there was another kind.
        arguments["ranges"] = "dynamic" if arguments.pop("dynamic") else "static"
    kind, grid = arguments.pop("kind", "int8"), arguments.pop("grid", None)
    if kind not in QUANTIZERS:
        raise ValueError(f"{path}: unknown quantizer {kind!r}; this folder was written by a newer compressft")
    new = QUANTIZERS[kind](**arguments)
    if isinstance(new, Int8Quantizer):
        new.observing = False
    if isinstance(new, Int4Quantizer) and grid is not None:
        new.fix(Grid(torch.zeros(grid), torch.zeros(grid)))
    return new


def rebuild(model: nn.Module, table: dict[str, dict[str, Any]]) -> None:
    """Put the described modules into a plain model of the right shapes; their tensors are loaded afterwards.

    Raises:
        ValueError: an unknown kind.
    """
    # Inner modules first: an AdaptedOutput takes over what is already in place below it.
    for path, entry in sorted(table.items(), key=lambda item: -item[0].count(".")):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if path.endswith(".inner"):
            continue
        setattr(owner, name, _build(owner.get_submodule(name), entry, path))


def _build(old: nn.Module, entry: dict[str, Any], path: str) -> nn.Module:
    kind = entry["kind"]
    adapter = None
    if "adapter" in entry:
        a = entry["adapter"]
        adapter = Bottleneck(a["width"], a["size"], a["activation"], "bert", torch.Generator().manual_seed(0))
    if kind == "linear":
        new = CompressedLinear.of(old)
        if "quantizer" in entry:
            new.quantizer = _build_quantizer(entry["quantizer"], path)
        new.adapter = adapter
        return new
    if kind == "embedding":
        assert isinstance(old, nn.Embedding)
        return CompressedEmbedding.of(old, entry.get("bits", 8), entry.get("block", 32))
    if kind == "adapted_output":
        assert adapter is not None
        return AdaptedOutput(old, adapter)
    if kind == "adapted_norm":
        assert adapter is not None and isinstance(old, nn.LayerNorm)
        return AdaptedNorm.of(old, adapter)
    raise ValueError(f"{path}: unknown kind {kind!r}; this folder was written by a newer compressft")
