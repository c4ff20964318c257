"""Which linear layers of a model a method acts on: parts of its layers from a depth on, its pooler, its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from compressft.anatomy import anatomy
from compressft.model import head_parameters

Part = Literal["q", "k", "v", "o", "up", "down", "pooler"]
PROJECTIONS: tuple[Part, ...] = ("q", "k", "v", "o", "up", "down")


def linear_paths(model: nn.Module, parts: Sequence[Part] = PROJECTIONS, first_layer: int = 0) -> list[str]:
    """Paths of these projections of the layers from `first_layer` on, and of the pooler's where "pooler" is among them.

    A fused qkv projection counts where all three are asked for. Families without a pooler have none to give.
    """
    found = anatomy(model)
    paths = [
        f"{layer.name}.{path}"
        for layer in found.layers
        if layer.index >= first_layer
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
