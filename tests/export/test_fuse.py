"""QAttention is put in only where it computes the same."""

import copy

import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from compressft.export.fuse import fuse_qattention


def graph_of(path):
    return onnx_ir.load(str(path))


@pytest.mark.parametrize(("kind", "layers"), [("tokens", 2), ("int8", 1)])
def test_every_layer_is_fused_once(exported, kind, layers):
    """But the last one of a classifier, whose queries are the first token's."""
    model = graph_of(exported(kind).path)
    assert fuse_qattention(model) == layers
    assert fuse_qattention(model) == 0


@pytest.mark.parametrize("kind", ["dense", "dynamic", "llama", "gpt2"])
def test_what_does_not_fit_is_left_alone(exported, kind):
    """Float and dynamic projections, causal attention, and projections of one fused weight."""
    model = graph_of(exported(kind).path)
    before = [(node.op_type, len(node.inputs)) for node in model.graph]
    assert fuse_qattention(model) == 0
    assert [(node.op_type, len(node.inputs)) for node in model.graph] == before


def test_weight_is_q_k_v_side_by_side(exported):
    """(in, 3 * out) with the scales and biases in the same order; each of the three really there."""
    plain = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(exported("tokens").path)).graph.initializer}
    fused = onnx.load(str(exported("tokens").fused)).graph
    values = {t.name: numpy_helper.to_array(t) for t in fused.initializer}
    nodes = [node for node in fused.node if node.op_type == "QAttention"]
    for layer, node in enumerate(nodes):
        weight = values[node.input[1]]
        width = weight.shape[1] // 3
        for i, part in enumerate(("query", "key", "value")):
            own = [v for n, v in plain.items() if f"layer.{layer}.attention.self.{part}" in n and v.ndim == 2]
            assert len(own) == 1 and (weight[:, i * width : (i + 1) * width] == own[0]).all()
        assert values[node.input[2]].shape == values[node.input[4]].shape == (3 * width,)
        heads = next(a.i for a in node.attribute if a.name == "num_heads")
        assert width == heads * 8


def test_projections_with_other_ranges_are_left_alone(exported):
    """One input scale serves all three; where k has its own, the general node stays."""
    model = copy.deepcopy(onnx.load(str(exported("tokens").path)))
    keys = [n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat" and "self.key" in n.input[1]]
    assert len(keys) == 2
    scale = next(t for t in model.graph.initializer if t.name == keys[0].input[2])
    own = numpy_helper.from_array(numpy_helper.to_array(scale) * 2, "own_scale")
    model.graph.initializer.append(own)
    keys[0].input[2] = "own_scale"
    assert fuse_qattention(onnx_ir.from_proto(model)) == 1


def test_attention_with_a_scale_of_its_own_is_left_alone(exported):
    """QAttention divides by the square root of the head's width and cannot be told otherwise."""
    model = copy.deepcopy(onnx.load(str(exported("tokens").path)))
    node = next(n for n in model.graph.node if n.op_type == "MultiHeadAttention")
    next(a for a in node.attribute if a.name == "scale").f = 1.0
    assert fuse_qattention(onnx_ir.from_proto(model)) == 1
