"""Only the first token is computed where only the first is read, and the logits stay what they were."""

import copy

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressft.export import onnx as exporting
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.onnx import save, to_graph
from compressft.export.pooled import compute_first_token, computes_first_token
from tests.export.conftest import kinds
from tests.tiny import padded, tiny

pytestmark = pytest.mark.dear

# XLM-RoBERTa and CamemBERT are RoBERTa's graph.
FIRST = ["bert", "roberta", "electra", "distilbert"]


def graphs(model, inputs, monkeypatch):
    """The graph as it is written, and without the rewriting, of one export."""
    plain = []

    def keep(graph):
        plain.append(onnx_ir.from_proto(onnx_ir.to_proto(graph)))
        return compute_first_token(graph)

    monkeypatch.setattr(exporting, "compute_first_token", keep)
    return [to_graph(fold(model), dict(inputs)), *plain]


def session(graph, path):
    save(graph, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def same_logits(graph, plain, inputs, tmp_path, limit):
    ours, theirs = session(graph, tmp_path / "first.onnx"), session(plain, tmp_path / "plain.onnx")
    generator = np.random.default_rng(0)
    for batch, length in ((1, 1), (1, 9), (3, 2), (5, 17)):
        ids = generator.integers(5, 90, (batch, length))
        mask = (np.arange(length) < generator.integers(1, length + 1, (batch, 1))).astype(np.int64)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        feed = {value.name: feed[value.name] for value in ours.get_inputs()}
        ours_out, theirs_out = ours.run(["logits"], feed)[0], theirs.run(["logits"], feed)[0]
        assert ours_out.shape == theirs_out.shape == (batch, 3)
        np.testing.assert_allclose(ours_out, theirs_out, rtol=0, atol=limit)


def lengths(graph):
    """Matrix products by whether they treat one token or all: (one, all)."""
    products = [
        n for n in graph.graph if n.op_type in ("MatMul", "MatMulIntegerToFloat") and len(n.outputs[0].shape) == 3
    ]
    one = sum(n.outputs[0].shape[1] == 1 for n in products)
    return one, len(products) - one


@pytest.mark.parametrize("family", FIRST)
def test_the_last_layer_computes_what_the_head_reads(family, tmp_path, monkeypatch):
    """Its query, output projection and FFN treat one token; its keys and values, and the layer before, treat all."""
    model = tiny(family)
    graph, plain = graphs(model, padded(), monkeypatch)
    assert computes_first_token(graph) and not computes_first_token(plain)
    projection = family == "electra"  # from its narrower embeddings
    assert lengths(graph) == (4, 8 + projection) and lengths(plain) == (0, 12 + projection)
    same_logits(graph, plain, padded(), tmp_path, 1e-5)


@pytest.mark.parametrize("kind", kinds("int8", "pruned", "houlsby", "pfeiffer"))
def test_compressed_models_too(exported, kind):
    model = onnx_ir.load(str(exported(kind).path))
    assert computes_first_token(model)
    assert exported(kind).error(4) < 1e-2


def test_static_int8_keeps_every_bit(exported, tmp_path):
    """The scales are constants: a token's integers do not depend on what else is computed."""
    whole = copy.copy(exported("int8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "compute_first_token", lambda graph: 0)
        plain = to_graph(fold(whole.model), padded())
    assert fuse_qattention(plain) == 2
    save(plain, tmp_path / "plain.onnx")
    whole.files = whole.path, tmp_path / "plain.onnx"
    for ours, theirs in zip(exported("int8").logits(4, fused=True), whole.logits(4, fused=True), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["tokens", "llama", "gpt2"])
def test_where_every_token_or_the_last_is_read_all_is_left_as_it_is(exported, kind):
    model = onnx_ir.load(str(exported(kind).path))
    assert not computes_first_token(model) and compute_first_token(model) == 0


def test_dynamic_ranges_are_taken_over_all_tokens(exported):
    """The last FFN's range would be another one over one token: nothing moves above it."""
    model = onnx_ir.load(str(exported("dynamic").path))
    dynamic = [n.outputs[0].shape for n in model.graph if n.op_type == "DynamicQuantizeMatMul"]
    assert len(dynamic) == 13 and all(len(shape) == 2 or shape[1] != 1 for shape in dynamic)


# By hand: what must not be narrowed.


def by_hand(nodes, initializers=(), outputs=("y",)):
    """x (B, T, 4) -> nodes -> y, the first token of h (B, T, 4)."""
    gather = helper.make_node("Gather", ["h", "zero"], ["y"], axis=1)
    values = {"zero": np.array(0), **dict(initializers)}
    shapes = {"x": ["B", "T", 4], "y": ["B", 4], "q": ["B", "T", 4], "h": ["B", "T", 4]}
    graph = helper.make_graph(
        [*nodes, gather],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shapes["x"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
        value_info=[
            helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in ("q", "h") if n not in outputs
        ],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def attention(**fields):
    more = fields.pop("inputs", [])
    return helper.make_node(
        "MultiHeadAttention", ["q", "x", "x", *more], ["h"], domain="com.microsoft", num_heads=2, **fields
    )


RELU = helper.make_node("Relu", ["x"], ["q"])
WEIGHT = np.eye(4, dtype=np.float32)


def narrowed(model):
    return sorted(
        node.op_type for node in model.graph if node.outputs[0].shape is not None and 1 in list(node.outputs[0].shape)
    )


def run(model, tmp_path):
    x = np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32)
    return session(model, tmp_path / "hand.onnx").run(["y"], {"x": x})[0]


@pytest.mark.parametrize(
    ("nodes", "initializers", "expected"),
    [
        ([RELU, attention()], (), ["MultiHeadAttention", "Relu", "Slice"]),
        ([RELU, attention(unidirectional=1)], (), []),
        ([RELU, attention(inputs=["", "", "bias"])], [("bias", np.ones((1, 1, 5, 5), np.float32))], []),
        ([RELU, helper.make_node("Add", ["q", "table"], ["h"])], [("table", np.ones((5, 4), np.float32))], []),
        ([RELU, helper.make_node("Add", ["q", "row"], ["h"])], [("row", WEIGHT[0])], ["Add", "Relu", "Slice"]),
        (
            [RELU, helper.make_node("LayerNormalization", ["q", "row"], ["h"], axis=1)],
            [("row", np.ones((5, 4), np.float32))],
            [],
        ),
        ([RELU, helper.make_node("Softmax", ["q"], ["h"], axis=1)], (), []),
        ([RELU, helper.make_node("MatMul", ["q", "w"], ["h"])], [("w", WEIGHT)], ["MatMul", "Relu", "Slice"]),
        # Something between is read whole.
        ([RELU, helper.make_node("Add", ["q", "q"], ["h"])], "q is an output", ["Add", "Slice"]),
    ],
    ids=["attention", "causal", "bias", "table", "row", "norm", "softmax", "matmul", "output"],
)
def test_by_hand(nodes, initializers, expected, tmp_path):
    outputs = ("y", "q") if isinstance(initializers, str) else ("y",)
    given = () if isinstance(initializers, str) else initializers
    plain, model = by_hand(nodes, given, outputs), by_hand(nodes, given, outputs)
    assert compute_first_token(model) == len([name for name in expected if name != "Slice"])
    assert narrowed(model) == expected
    np.testing.assert_allclose(run(model, tmp_path), run(plain, tmp_path), rtol=1e-5, atol=1e-6)


def test_another_token_is_left_alone(tmp_path):
    nodes = [RELU, helper.make_node("Relu", ["q"], ["h"])]
    assert compute_first_token(by_hand(nodes)) == 2
    assert compute_first_token(by_hand(nodes, [("zero", np.array(1))])) == 0


def test_one_slice_serves_all_readers(tmp_path):
    """The last layer's residual and its query read the same hidden states."""
    inputs = padded()
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    graph = to_graph(fold(model), dict(inputs))
    slices = [n for n in graph.graph if n.op_type == "Slice" and n.outputs[0].name.endswith(".first_token")]
    assert len(slices) == 1 and len(slices[0].outputs[0].uses()) == 2
    # And torch's logits are still the file's.
    opened = session(graph, tmp_path / "model.onnx")
    with torch.no_grad():
        want = model(**inputs).logits.numpy()
    feed = {value.name: inputs[value.name].numpy() for value in opened.get_inputs()}
    np.testing.assert_allclose(opened.run(["logits"], feed)[0], want, atol=1e-5)


def test_files_are_valid(exported):
    onnx.checker.check_model(onnx.load(str(exported("dense").path)))
