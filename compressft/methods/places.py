"""Which linear layers of a model a method acts on: parts of its layers from a depth on, its pooler, its head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from compressft.model.anatomy import Layer, anatomy
from compressft.model.surgery import head_parameters
from compressft.transform import Resource, Want

Part = Literal["q", "k", "v", "o", "up", "down", "pooler"]
PROJECTIONS: tuple[Part, ...] = ("q", "k", "v", "o", "up", "down")


def stack(layer: Layer) -> str:
    """Path of the list of layers that one is in: an encoder's or a decoder's."""
    return layer.name.rpartition(".")[0]


def stacks(model: nn.Module) -> Counter[str]:
    """How many layers each stack has."""
    return Counter(stack(layer) for layer in anatomy(model).layers)


def linear_paths(
    model: nn.Module, parts: Sequence[Part] = PROJECTIONS, first_layer: Mapping[str, int] | None = None
) -> list[str]:
    """Paths of these projections of the layers, and of the pooler's where "pooler" is among them.

    A fused qkv projection counts where all three are asked for. Families without a pooler have none to give.

    Args:
        first_layer: by stack, the first layer that counts (default: all count).
    """
    found, first = anatomy(model), first_layer or {}
    paths = [
        f"{layer.name}.{path}"
        for layer in found.layers
        if layer.index >= first.get(stack(layer), 0)
        for path, roles in layer.roles.items()
        if set(roles) <= set(parts)
    ]
    if "pooler" in parts and found.family.pooler and getattr(found.backbone, found.family.pooler, None) is not None:
        paths += _linears(model, found.path(found.family.pooler))
    return paths


def head_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers outside the backbone whose weight is no other's."""
    pooler = set(linear_paths(model, ("pooler",)))
    names = {name.rpartition(".")[0] for name, _ in head_parameters(model) if name.endswith(".weight")}
    return [path for path in _linears(model, "") if path in names - pooler]


def _linears(model: nn.Module, root: str) -> list[str]:
    prefix = f"{root}." if root else ""
    return [
        f"{prefix}{path}" for path, m in model.get_submodule(root).named_modules() if path and isinstance(m, nn.Linear)
    ]


def as_saved(field: str) -> tuple[Want, ...]:
    """What saved adapters, which this field names, want of the model that they are put into."""
    reason, fix = "saved adapters want the layers that they were trained on", "do it in a stage after this one"
    return tuple(Want(one, reason, field, fix) for one in (Resource.STARTING_LAYERS, Resource.STARTING_SHAPES))
