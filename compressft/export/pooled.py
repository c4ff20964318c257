"""Compute the last layer for the one token that is read: classifiers pool the first and drop all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressft.export.nodes import given, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Operators whose output at a token depends on their inputs at that token alone, by the inputs that carry tokens.
# Dynamic quantisation is none of them: its range is taken over all tokens.
ARITHMETIC = frozenset(("Add", "Sum", "Sub", "Mul", "Div", "Pow", "Sqrt", "Cast", "Identity"))
ACTIVATIONS = frozenset(
    ("Erf", "Tanh", "Sigmoid", "HardSigmoid", "Relu", "LeakyRelu", "Elu", "Gelu", "Swish", "HardSwish")
)
EVERY_INPUT = ARITHMETIC | ACTIVATIONS | {"QuickGelu", "FastGelu"}
NORMS = frozenset(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"))
QUANTISERS = frozenset(("QuantizeLinear", "DequantizeLinear"))
FIRST_INPUT = NORMS | QUANTISERS | {"MatMul", "MatMulIntegerToFloat", "MatMulNBits", "MultiHeadAttention"}
# (batch, tokens, features)
RANK, TOKENS = 3, 1
# Initialisers that say which token.
CONSTANT = "first_token"


def compute_first_token(model: ir.Model) -> int:
    """Where only the first token of hidden states (B, T, H) is read, compute only that one.

    The read moves up through everything that treats tokens by themselves: the last layer's FFN, norms, output
    projection and queries see (B, 1, H); its keys and values, and all layers before, see every token as ever. The
    logits stay what they were. A layer costs next to nothing but its keys and values then.

    Args:
        model: an `onnx_ir.Model` with shapes, changed in place.

    Returns:
        how many nodes compute one token now.
    """
    narrow: set[ir.Node] = set()
    # What reads nothing but the first token: (node, position of the input).
    uses: set[tuple[ir.Node, int]] = set()
    for node in reversed(list(model.graph)):
        if _reads_first(node):
            uses.add((node, 0))
        elif all(_unread(value, uses) for value in node.outputs):
            carried = _carriers(node)
            if carried:
                narrow.add(node)
                uses.update((node, position) for position in carried)
    if not narrow:
        return 0
    for node in narrow:
        for value in node.outputs:
            value.shape = _one_token(shape_of(value))
    read = [
        value
        for node in model.graph
        for place, value in enumerate(node.inputs)
        if value is not None and (node, place) in uses
    ]
    for value in dict.fromkeys(read):
        # Gather reads the first of one as well as of many.
        readers = [use for use in value.uses() if (use.node, use.idx) in uses and use.node in narrow]
        if readers and value.producer() not in narrow:
            first = _first_of(model, value)
            for use in readers:
                use.node.replace_input_with(use.idx, first)
    return len(narrow)


def computes_first_token(model: ir.Model) -> bool:
    """Whether `compute_first_token` found something to do in this graph."""
    return f"{CONSTANT}.start" in model.graph.initializers


def _reads_first(node: ir.Node) -> bool:
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != TOKENS or not _has_tokens(given(node, 0)):
        return False
    index = given(node, 1).const_value
    return index is not None and index.size == 1 and index.numpy().item() == 0


def _has_tokens(value: ir.Value) -> bool:
    """Whether its second axis has the inputs' length, which is known only when it runs."""
    shape = value.shape
    return shape is not None and len(shape) == RANK and not isinstance(shape[TOKENS], int)


def _unread(value: ir.Value, uses: set[tuple[ir.Node, int]]) -> bool:
    """Whether nothing reads more of it than its first token."""
    found = value.uses()
    return bool(found) and not value.is_graph_output() and all((use.node, use.idx) in uses for use in found)


def _carriers(node: ir.Node) -> list[int]:
    """Positions of the inputs that carry tokens; none where tokens depend on each other, or that is not known."""
    if len(node.outputs) != 1 or not _has_tokens(node.outputs[0]):
        return []
    if node.op_type in FIRST_INPUT:
        return [0] if _has_tokens(given(node, 0)) and _by_token(node) else []
    present = [(position, value) for position, value in enumerate(node.inputs) if value is not None]
    carried = [position for position, value in present if _has_tokens(value)]
    others = [value for position, value in present if position not in carried]
    return carried if node.op_type in EVERY_INPUT and all(map(_same_for_all, others)) else []


def _same_for_all(value: ir.Value) -> bool:
    """Whether it is broadcast over the tokens."""
    shape = value.shape
    return shape is not None and (len(shape) < 2 or shape[-2] == 1) and len(shape) <= RANK


def _by_token(node: ir.Node) -> bool:
    if node.op_type in NORMS:
        return node.attributes.get_int("axis", -1) in (-1, RANK - 1)
    if node.op_type in QUANTISERS:
        return all(value is None or (value.shape is not None and len(value.shape) == 0) for value in node.inputs[1:])
    if node.op_type == "MultiHeadAttention":
        # Causal attention counts positions from the end; a bias has a row per query; a past, one per step.
        causal = node.attributes.get_int("unidirectional", 0)
        return not causal and all(value is None for value in node.inputs[5:])
    return True


def _one_token(shape: ir.Shape) -> ir.Shape:
    import onnx_ir

    return onnx_ir.Shape([1 if axis == TOKENS else size for axis, size in enumerate(shape)])


def _first_of(model: ir.Model, value: ir.Value) -> ir.Value:
    """A slice of it, (B, 1, H)."""
    import onnx_ir

    bounds = [_constant(model, f"{CONSTANT}.{name}", at) for name, at in (("start", 0), ("end", 1), ("axis", TOKENS))]
    node = onnx_ir.Node("", "Slice", [value, *bounds], num_outputs=1)
    out, producer = node.outputs[0], value.producer()
    out.name, out.type, out.shape = f"{value.name}.{CONSTANT}", value.type, _one_token(shape_of(value))
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return out


def _constant(model: ir.Model, name: str, number: int) -> ir.Value:
    import numpy as np
    import onnx_ir

    if name not in model.graph.initializers:
        tensor = onnx_ir.tensor(np.array([number], np.int64), name=name)
        kind = onnx_ir.TensorType(tensor.dtype)
        value = onnx_ir.Value(name=name, const_value=tensor, shape=onnx_ir.Shape([1]), type=kind)
        model.graph.initializers[name] = value
    return model.graph.initializers[name]
