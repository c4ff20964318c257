"""Write a folded model as one ONNX file through transformers' exporter, and tidy the graph."""

from __future__ import annotations

import ast
import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressft.errors import UserError
from compressft.export.cache import PAST, dynamic_axes, name_cache
from compressft.export.nodes import given, name_of
from compressft.export.pooled import compute_first_token
from compressft.export.rotary import without_branches
from compressft.modules.pretrained import pretrained

if TYPE_CHECKING:
    import onnx_ir as ir

# Where the exporter notes the modules that a node came from, outermost first.
SCOPES = "pkg.torch.onnx.name_scopes"


def to_graph(model: nn.Module, inputs: Mapping[str, object], tidy: bool = True) -> ir.Model:
    """Export with dynamic batch and length to an `onnx_ir.Model`.

    Args:
        inputs: sample batch (B, T) with B and T above 1, so that neither is taken for a constant; of `with_cache`
            where the file is to take and give keys and values.
        tidy: apply our graph passes; off gives exactly what transformers exports.

    Raises:
        UserError: this transformers has no complete exporter (before 5.20).
    """
    try:
        from transformers.exporters.configs import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError:
        import transformers

        raise UserError(
            f"export: needs transformers >= 5.20 for its ONNX exporter; this is {transformers.__version__}"
        ) from None
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    config = OnnxConfig(dynamic_shapes={name: dynamic_axes(value) for name, value in inputs.items()})
    with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        copied = pretrained(without_branches(copy.deepcopy(model)))
        # Without an input for them nobody could use the keys and values that decoders also give.
        given = {**inputs, "use_cache": PAST in inputs}
        exported = OnnxExporter().export(copied, given, config=config)
    graph = exported.program
    if not tidy:
        return graph
    drop_round_trips(graph)
    keep_norms_unfused(graph)
    merge_scalars(graph)
    # q, k and v quantise the same input with the same range: after this they share one node.
    CommonSubexpressionEliminationPass()(graph)
    own_zero_points(graph)
    RemoveUnusedNodesPass()(graph)
    compute_first_token(graph)
    if PAST in inputs:
        name_cache(graph)
    strip(graph)
    return graph


def strip(model: ir.Model) -> None:
    """Name every node after its module, "bert.encoder.layer.0.output/Add_12", and drop what the exporter noted.

    Its notes are source lines and paths of the machine that exported: up to two thirds of a small file's bytes. The
    types and shapes of initialisers it noted twice; those of nodes' outputs stay, which onnxruntime opens a file faster
    with.
    """
    for number, node in enumerate(model.graph):
        scopes = [scope for scope in ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))[:-1] if scope]
        node.name = f"{scopes[-1] if scopes else ''}/{node.op_type}_{number}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for value in model.graph.initializers.values():
        if not value.is_graph_output():
            value.shape = value.type = None
    for holder in (model.graph, model):
        holder.metadata_props.clear()
        holder.doc_string = None


def module_of(name: str) -> str:
    """The module that a node named by `strip` came from."""
    return name.rpartition("/")[0]


def merge_scalars(model: ir.Model) -> None:
    """Let equal one-element initialisers be one value, so that equal nodes are recognised as equal."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.size > 1 or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        if key in first:
            value.replace_all_uses_with(first[key])
            del model.graph.initializers[name_of(value)]
        else:
            first[key] = value


def own_zero_points(model: ir.Model) -> None:
    """Give each weight's DequantizeLinear a zero point of its own, of which the exporter has made equal ones one.

    Where exact kernels are asked for, onnxruntime turns s8 weights and their zero points into u8, and fails at the
    second weight that shares one.
    """
    import onnx_ir

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        weight, point = given(node, 0), node.inputs[2]
        name = f"{weight.name}_zero_point"
        if weight.const_value is None or point is None or point.const_value is None:
            continue
        if name in model.graph.initializers:
            # This one's already; equal nodes of one weight are one node by now.
            continue
        own = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(point.const_value.numpy(), name=name))
        model.graph.register_initializer(own)
        node.replace_input_with(2, own)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's logger to errors for a while."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def drop_round_trips(model: ir.Model) -> None:
    """Remove Reshape pairs that end in the shape they began with (attention's split into heads and back)."""
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        inner = given(node, 0).producer()
        if inner is None or inner.op_type != "Reshape":
            continue
        source, result = given(inner, 0), node.outputs[0]
        if source.shape is not None and source.shape == result.shape and not result.is_graph_output():
            result.replace_all_uses_with(source)


def keep_norms_unfused(model: ir.Model) -> None:
    """Write residual Adds before a LayerNormalization as Sum, which onnxruntime does not fuse.

    Its SkipLayerNormalization is slower than Add + LayerNormalization: a pruned int8 MiniLM took 2.7 ms at 1x128
    with it, 1.5 ms without.
    """
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "LayerNormalization":
            continue
        add = given(node, 0).producer()
        if add is not None and add.op_type == "Add" and add.domain == "":
            new = onnx_ir.Node("", "Sum", list(add.inputs), num_outputs=1, name=add.name)
            new.metadata_props.update(add.metadata_props)
            old, out = add.outputs[0], new.outputs[0]
            out.shape, out.type, out.name = old.shape, old.type, old.name
            model.graph.insert_before(add, new)
            old.replace_all_uses_with(out)
            model.graph.remove(add, safe=True)


def save(model: ir.Model, path: Path) -> None:
    """One self-contained file, or `model.onnx.data` next to it where the weights pass protobuf's 2 GB."""
    import onnx_ir

    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    onnx_ir.save(model, str(path), external_data=f"{path.name}.data" if total > 1_900_000_000 else None)


def drop_weights(model: ir.Model) -> None:
    """Let go of a saved graph's weights: the exporter's rewrite rules keep the last graph that they saw for good."""
    for value in model.graph.initializers.values():
        value.const_value = None


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(node.op_type for node in model.graph)
