"""Where the parts of a model are: layers, their projections, norms, tables and heads, found by its family's row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from compressft.errors import UserError
from compressft.modules.families import FAMILIES, Family
from compressft.modules.pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its module, the family's paths into it, and its present shape.

    `family` is the row of the stack that the layer is in, `index` its number in that stack.
    """

    index: int
    name: str
    module: nn.Module
    family: Family
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def part(self, path: str) -> nn.Module:
        """The module at a layer-relative path."""
        return self.module.get_submodule(path)

    @property
    def projections(self) -> tuple[str, ...]:
        """Paths of the attention's input projections."""
        f = self.family
        return (f.fused_qkv,) if f.fused_qkv else tuple(p for p in (f.q, f.k, f.v) if p)

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of all linear projections, in execution order."""
        return (*self.projections, self.family.o, *self.family.cross_linears, *self.family.up, self.family.down)

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Path -> "q", "k", "v", "o", "up" or "down" (all three of q, k, v where fused), in execution order."""
        f = self.family
        fixed = {f.q: "q", f.k: "k", f.v: "v", f.o: "o", f.down: "down", **dict.fromkeys(f.up, "up")}
        fixed |= dict(zip(f.cross_linears, "qkvo", strict=False))
        return {path: tuple("qkv") if path == f.fused_qkv else (fixed[path],) for path in self.linears}


@dataclass(frozen=True)
class Stream:
    """Model-level paths of everything that touches the residual stream.

    `norms` normalise it, `reads` are linear layers whose columns are its dimensions, `writes` those whose rows are,
    `tables` embeddings whose columns are. `projection` (also among `writes`) writes it without a norm behind.
    """

    norms: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tables: tuple[str, ...]
    projection: str | None


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model. `prefix` is the backbone's name inside the model ('' where the model is the backbone)."""

    family: Family
    prefix: str
    backbone: PreTrainedModel
    layers: tuple[Layer, ...]

    def path(self, relative: str) -> str:
        """A backbone-relative path as seen from the whole model."""
        return f"{self.prefix}.{relative}" if self.prefix else relative

    @property
    def width(self) -> int:
        """Dimensions of the residual stream."""
        return linear_shape(self.layers[0].part(self.layers[0].projections[0]))[0]

    @property
    def embedding_paths(self) -> tuple[str, ...]:
        """Model-level paths of the embedding modules."""
        return tuple(self.path(p) for p in self.family.embeddings)


def family_of(model: nn.Module) -> Family:
    """The row of a transformers model's family.

    Raises:
        UserError: the family is unknown; the message lists the known ones.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"model: family {model_type!r} is not known to anatomy; known families: {known}")
    return FAMILIES[model_type]


def anatomy(model: nn.Module) -> Anatomy:
    """Look at a transformers model as it is now, pruned or not; shapes are read from its weights.

    Raises:
        UserError: its family is unknown, or its class is of another family than its configuration.
    """
    family = family_of(model)
    prefix = getattr(model, "base_model_prefix", "")
    prefix = prefix if prefix and hasattr(model, prefix) else ""
    backbone = pretrained(model.get_submodule(prefix))
    rows = [row for row in (family, family.decoder) if row is not None]
    if any(_find(backbone, row.layers) is None for row in rows):
        found = model.config.model_type  # type: ignore[union-attr]
        raise UserError(
            f"model: a {type(model).__name__} of the configuration of a {found!r}, whose layers it does not have; "
            f"give a model of the class's family or a class of {found!r}"
        )
    layers = [layer for row in rows for layer in _stack(row, prefix, backbone)]
    if not layers:
        raise UserError(f"model: a {type(model).__name__} without layers; there is nothing to train or to compress")
    return Anatomy(family, prefix, backbone, tuple(layers))


def positions(model: nn.Module) -> int | None:
    """How many tokens a row may have; None without a table of positions."""
    parts = anatomy(model)
    if parts.family.positions is None:
        return None
    table = parts.backbone.get_submodule(parts.family.positions)
    assert isinstance(table, nn.Embedding)
    # RoBERTa counts from behind its padding id.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def refuse_pairs(model: nn.Module, who: str) -> None:
    """For what is made for a single stack of layers.

    Raises:
        UserError: the model is an encoder-decoder.
    """
    if family_of(model).decoder is not None:
        raise UserError(f"{who}: {model.config.model_type} is an encoder-decoder; this wants a single stack of layers")  # type: ignore[union-attr]


def stream(model: nn.Module) -> Stream:
    """Who reads, writes and normalises the residual stream of a model with any of its family's heads."""
    refuse_pairs(model, "hidden width")
    parts = anatomy(model)
    family = parts.family

    def found(path: str | None) -> str | None:
        """The model-level path, or None where this model has no such module (a pooler may be there as None)."""
        if path is None:
            return None
        path = path.replace("@.", f"{parts.prefix}." if parts.prefix else "")
        return path if _find(model, path) is not None else None

    projection = found(family.embedding_projection and f"@.{family.embedding_projection}")
    norms, reads, writes = [], [], [projection] if projection else []
    tables = () if projection else tuple(parts.path(table) for table in family.embedding_tables)
    if tables and family.embedding_norm:
        norms.append(parts.path(family.embedding_norm))
    for layer in parts.layers:
        norms += [f"{layer.name}.{path}" for path in family.norms]
        reads += [f"{layer.name}.{path}" for path in (*layer.projections, *family.up)]
        writes += [f"{layer.name}.{path}" for path in (family.o, family.down)]
    if family.final_norm:
        norms.append(parts.path(family.final_norm))
    reads += [path for group in family.readers for path in [p for p in map(found, group) if p][:1]]
    for dense, norm, decoder in family.transforms:
        if found(dense):
            reads.append(dense)
            if tables:
                writes.append(dense)
                norms.append(norm)
                reads.append(decoder)
    return Stream(tuple(norms), tuple(reads), tuple(writes), tables, projection)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a Linear or of GPT-2's Conv1D, whose weight is (in, out)."""
    if isinstance(module, nn.Linear):
        # Its weight may be stored otherwise than as a tensor of its shape.
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    rows, columns = weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _stack(family: Family, prefix: str, backbone: nn.Module) -> list[Layer]:
    stack = backbone.get_submodule(family.layers)
    assert isinstance(stack, nn.ModuleList)
    root = f"{prefix}.{family.layers}" if prefix else family.layers
    return [_layer(family, i, f"{root}.{i}", module) for i, module in enumerate(stack)]


def _layer(family: Family, index: int, name: str, module: nn.Module) -> Layer:
    present = tuple(path for path in family.up if _find(module, path) is not None)
    if present != family.up:
        # T5's FFN is gated in some of its models.
        family = replace(family, up=present)
    attention = module.get_submodule(family.attention)
    head_dim = int(getattr(attention, family.head_size))
    width = linear_shape(module.get_submodule(family.o))[0]
    kv_width = width if family.k is None else linear_shape(module.get_submodule(family.k))[1]
    return Layer(
        index=index,
        name=name,
        module=module,
        family=family,
        heads=width // head_dim,
        kv_heads=kv_width // head_dim,
        head_dim=head_dim,
        ffn=linear_shape(module.get_submodule(family.down))[0],
    )


def _find(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None (a part may also be there as None)."""
    owner: object = root
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner if isinstance(owner, nn.Module) else None
