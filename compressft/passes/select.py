"""Which linear layers of a model a pass works on: all of its transformer layers' less what `exclude` names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compressft.anatomy import anatomy
from compressft.errors import UserError, nearest

LINEARS = ("q", "k", "v", "o", "up", "down")


def check_exclude(model: nn.Module, field: str, exclude: Sequence[str], parts: Sequence[str] = LINEARS) -> None:
    """Refuse names that are neither one of `parts` nor a module of the model; `field` names the setting.

    Raises:
        UserError: such a name.
    """
    modules = dict(model.named_modules())
    for name in exclude:
        if name not in parts and name not in modules:
            raise UserError(
                f"{field}: {name!r} is neither a part nor a module of the model; parts: {', '.join(parts)}"
                f"{nearest(name, [*parts, *modules])}"
            )


def layer_linears(model: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
    """Paths of the transformer layers' linear projections, in execution order; never embeddings, pooler or head.

    `exclude` lists parts (`LINEARS`) or full module paths; a fused qkv projection is out where any of its three is.
    """
    parts = anatomy(model)
    family = parts.family
    roles = {family.q: "q", family.k: "k", family.v: "v", family.o: "o", family.down: "down"}
    roles |= dict.fromkeys(family.up, "up")
    if family.fused_qkv:
        roles[family.fused_qkv] = next((part for part in "qkv" if part in exclude), "q")
    return [
        f"{layer.name}.{path}"
        for layer in parts.layers
        for path in layer.linears
        if roles.get(path) not in exclude and f"{layer.name}.{path}" not in exclude
    ]
