"""Real removal: heads, neurons, layers, hidden dimensions and vocabulary rows leave the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import Layer, anatomy, refuse_pairs, stream
from compressft.modules.bottleneck import BottleneckLayers
from compressft.modules.linear import CompressedLinear
from compressft.modules.prefix import Prefix
from compressft.modules.pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def shapes(model: nn.Module) -> list[dict[str, int]]:
    """Per layer: {"heads", "kv_heads", "ffn"} as they are now."""
    return [{"heads": x.heads, "kv_heads": x.kv_heads, "ffn": x.ffn} for x in anatomy(model).layers]


def shrink(model: nn.Module, keep: Sequence[Mapping[str, Tensor]]) -> None:
    """Really remove heads and FFN neurons.

    Args:
        keep: per layer {"heads": kept KV-group indices, "ffn": kept neuron indices}, int64, ascending. A KV group is
            one key/value head with the query heads that share it (a single head without grouped-query attention).

    Raises:
        ValueError: a number of layers that is not the model's.
        UserError: heads of a family whose heads cannot go.
    """
    layers = anatomy(model).layers
    if len(keep) != len(layers):
        raise ValueError(f"shrink: {len(keep)} layers given, the model has {len(layers)}")
    for layer, kept in zip(layers, keep, strict=True):
        if "heads" in kept:
            if layer.family.fixed_heads and len(kept["heads"]) < layer.kv_heads:
                raise UserError("heads: all layers of this family share a position bias per head; prune its FFN alone")
            _shrink_heads(layer, kept["heads"])
        if "ffn" in kept:
            for path in layer.family.up:
                _slice(layer.part(path), rows=kept["ffn"])
            _slice(layer.part(layer.family.down), columns=kept["ffn"])


def resize(
    model: nn.Module, target: Sequence[Mapping[str, int]], width: int | None = None, who: str = "resize"
) -> None:
    """Give a freshly built model the shapes of a compressed one (the values are loaded afterwards).

    Args:
        target: per layer, as `shapes` gives them.
        width: dimensions of the residual stream; None leaves them.
        who: what says so, for messages.

    Raises:
        UserError: another number of layers, or more of something than the model has.
    """
    _refuse_growth(model, target, width, who)
    keep = [{"heads": torch.arange(shape["kv_heads"]), "ffn": torch.arange(shape["ffn"])} for shape in target]
    shrink(model, keep)
    if width is not None and width != anatomy(model).width:
        narrow(model, torch.arange(width))


def _refuse_growth(model: nn.Module, target: Sequence[Mapping[str, int]], width: int | None, who: str) -> None:
    present = shapes(model)
    if len(target) != len(present):
        raise UserError(f"{who}: shapes of {len(target)} layers, the model has {len(present)}")
    for number, (wanted, has) in enumerate(zip(target, present, strict=True)):
        for name in ("kv_heads", "ffn"):
            if wanted[name] > has[name]:
                raise UserError(f"{who}: shapes.{number}.{name} is {wanted[name]}, the model has {has[name]}")
    if width is not None and not 0 < width <= anatomy(model).width:
        raise UserError(f"{who}: width is {width}, the model has {anatomy(model).width}")


@torch.no_grad()
def narrow(model: nn.Module, dims: Tensor) -> None:
    """Keep these dimensions (int64, ascending) of the residual stream: in embeddings, norms, layers and heads.

    A pooler (or a head's first layer) keeps its output as wide as it was; tied weights stay tied. The configuration is
    not changed: most families cannot state a width that is not heads * head_dim.
    """
    flow = stream(model)
    size = anatomy(model).width
    # Old weight (kept alive, so that its id stays its own) -> its narrower self, for weights that are tied.
    cut: dict[int, tuple[Tensor, Tensor]] = {}
    for path in flow.tables:
        table = model.get_submodule(path)
        assert isinstance(table, nn.Embedding)
        old = table.weight
        table.weight = _keep(old, 1, dims)
        table.embedding_dim = len(dims)
        cut[id(old)] = (old, table.weight)
    for path in flow.reads:
        linear = model.get_submodule(path)
        if id(linear.weight) in cut:
            assert isinstance(linear, nn.Linear)
            linear.weight = cut[id(linear.weight)][1]
            linear.in_features = len(dims)
        else:
            _slice(linear, columns=dims)
    for path in flow.writes:
        _slice(model.get_submodule(path), rows=dims)
    for path in flow.norms:
        norm = model.get_submodule(path)
        for name, parameter in list(norm.named_parameters(recurse=False)):
            setattr(norm, name, _keep(parameter, 0, dims))
        if isinstance(norm, nn.LayerNorm):
            norm.normalized_shape = (len(dims),)
    for module in model.modules():
        # Adapters sit on the stream wherever a method puts them.
        if isinstance(module, BottleneckLayers) and module.up_bias.shape[0] == size:
            module.down_weight = _keep(module.down_weight, 1, dims)
            module.up_weight = _keep(module.up_weight, 0, dims)
            module.up_bias = _keep(module.up_bias, 0, dims)


def _shrink_heads(layer: Layer, groups: Tensor) -> None:
    family, dim = layer.family, layer.head_dim
    queries_per_group = layer.heads // layer.kv_heads
    kv_rows = _spans(groups, dim)
    q_rows = _spans(groups, dim * queries_per_group)
    if family.fused_qkv:
        width = layer.heads * dim
        fused = torch.cat([q_rows, width + kv_rows, 2 * width + kv_rows])
        _slice(layer.part(family.fused_qkv), rows=fused)
    else:
        for path, rows in ((family.q, q_rows), (family.k, kv_rows), (family.v, kv_rows)):
            assert path is not None
            _slice(layer.part(path), rows=rows)
    _slice(layer.part(family.o), columns=q_rows)
    attention = layer.part(family.attention)
    prefix = getattr(attention, "prefix", None)
    if prefix is not None:
        # One that is still reparameterised is settled before anything is cut.
        assert isinstance(prefix, Prefix)
        prefix.keep(groups)
    kept = len(groups)
    for name, value in family.shape_attributes.items():
        setattr(attention, name, value(kept * queries_per_group, kept, dim))


def _spans(groups: Tensor, size: int) -> Tensor:
    """Row indices of blocks of `size` rows."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)[None, :]).reshape(-1)


@torch.no_grad()
def _slice(module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep these output rows and input columns of a Linear, CompressedLinear or Conv1D, in place."""
    if isinstance(module, CompressedLinear):
        module.unpack()
        if module.delta is not None and not len(module.gates):
            # What is added to a weight has its shape too.
            module.fold()
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    # A gate has the weight's shape; passes that gate single weights settle theirs before anything is cut.
    assert not (isinstance(module, CompressedLinear) and len(module.gates))
    transposed = type(module).__name__ == "Conv1D"
    row_dim, column_dim = (1, 0) if transposed else (0, 1)
    if rows is not None:
        weight = _keep(weight, row_dim, rows)
        if isinstance(module.bias, nn.Parameter):
            module.bias = _keep(module.bias, 0, rows)
    if columns is not None:
        weight = _keep(weight, column_dim, columns)
    module.weight = weight
    if transposed:
        module.nx, module.nf = weight.shape  # type: ignore[assignment]
    else:
        module.out_features, module.in_features = weight.shape  # type: ignore[assignment]


def drop_layers(model: nn.Module, keep: Sequence[int]) -> None:
    """Keep these layers (indices, ascending) and remove the others; caches and configuration count again.

    Raises:
        UserError: an index that is no layer, one given twice, or none.
    """
    refuse_pairs(model, "dropping layers")
    parts = anatomy(model)
    depth = len(parts.layers)
    if not keep or sorted(set(keep)) != list(keep) or not 0 <= keep[0] <= keep[-1] < depth:
        raise UserError(f"layers {list(keep)}: want ascending indices of 0 to {depth - 1}, at least one")
    stack = nn.ModuleList(parts.layers[i].module for i in keep)
    owner, _, name = parts.family.layers.rpartition(".")
    setattr(parts.backbone.get_submodule(owner), name, stack)
    for index, layer in enumerate(stack):
        for module in layer.modules():
            # Key/value caches are addressed by it.
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    config = pretrained(model).config
    config.num_hidden_layers = len(keep)
    for field in ("layer_types", "mlp_layer_types"):
        kinds = getattr(config, field, None)
        if kinds is not None:
            setattr(config, field, [kinds[i] for i in keep])


@torch.no_grad()
def keep_vocabulary(model: nn.Module, rows: Tensor) -> None:
    """Keep these rows (int64, ascending) of the token embedding and of an output projection over the vocabulary.

    Token ids that the configuration names are renumbered; those of removed tokens become None.

    Raises:
        UserError: positions are counted from the padding id (RoBERTa) and that id would change.
    """
    owner = pretrained(model)
    table = owner.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    size = table.num_embeddings
    new = {int(old): position for position, old in enumerate(rows.tolist())}
    for module in model.modules():
        # RoBERTa's position numbers start behind its padding id.
        pad = getattr(module, "padding_idx", None)
        if hasattr(module, "create_position_ids_from_input_ids") and pad is not None and new.get(pad) != pad:
            raise UserError(f"vocabulary: the model counts positions from its padding id {pad}, which must stay")
    head = owner.get_output_embeddings()
    assert head is None or isinstance(head, nn.Linear)
    tied = head is not None and head.weight is table.weight
    table.weight = _keep(table.weight, 0, rows)
    table.num_embeddings = len(rows)
    if table.padding_idx is not None:
        table.padding_idx = new.get(table.padding_idx)
    if head is not None and (tied or head.weight.shape[0] == size):
        head.weight = table.weight if tied else _keep(head.weight, 0, rows)
        head.out_features = len(rows)
        if head.bias is not None:
            head.bias = _keep(head.bias, 0, rows)
    for config in (owner.config, getattr(owner, "generation_config", None)):
        if config is not None:
            _renumber(config, new)
    owner.config.vocab_size = len(rows)


def _keep(parameter: Tensor, dim: int, indices: Tensor) -> nn.Parameter:
    """A new parameter with these indices of one dimension."""
    kept = parameter.detach().index_select(dim, indices.to(parameter.device)).contiguous()
    return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _renumber(config: PretrainedConfig, new: Mapping[int, int]) -> None:
    for name in ("pad", "bos", "eos", "unk", "sep", "decoder_start"):
        name += "_token_id"
        value = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, [new[v] for v in value if v in new] or None)
        elif value is not None:
            setattr(config, name, new.get(value))
