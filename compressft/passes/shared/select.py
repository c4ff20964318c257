"""Which linear layers of a model a pass works on: all of its transformer layers' less what `exclude` names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from compressft.errors import UserError, nearest
from compressft.model.anatomy import anatomy

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
    return [
        f"{layer.name}.{path}"
        for layer in anatomy(model).layers
        for path, parts in layer.roles.items()
        if f"{layer.name}.{path}" not in exclude and not any(part in exclude for part in parts)
    ]
