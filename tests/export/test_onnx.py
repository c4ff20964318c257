"""The written graph: what it computes, which operators it has, and that padding and batch mates change nothing."""

import gc
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compressft.evaluation.logits import model_logits
from compressft.export.onnx import drop_weights, save, to_graph
from tests.export.conftest import kinds

LAYERS = 2
KINDS = kinds("int8", "dense", "pruned", "houlsby", "pfeiffer", "tokens", "regression", "llama", "mistral", "gpt2")
INT8 = kinds("int8", "houlsby", "pfeiffer", "tokens", "regression")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 5, 12])
def test_file_equals_model(exported, kind, batch):
    """Rows of other lengths than the traced ones, alone and padded. Integers agree up to a rounding that flips."""
    limit = 1e-4 if kind in ("dense", "pruned") else 0.05
    assert exported(kind).error(batch) < limit


@pytest.mark.parametrize("kind", INT8)
def test_fused_file_equals_model(exported, kind):
    assert exported(kind).error(5, fused=True) < 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_causal_attention_is_not_fused(exported, kind):
    """QAttention has no causal mask that fits; the general node keeps its own."""
    found = exported(kind)
    assert found.fused is None and found.operators()["MultiHeadAttention"] == LAYERS


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["int8", "pfeiffer", "tokens"])
def test_batch_mates_change_nothing(exported, kind, fused):
    """Static ranges: a row's result in a padded batch is the one it has alone, but for the order of float sums."""
    alone, padded = exported(kind).logits(1, fused), exported(kind).logits(12, fused)
    for one, other in zip(alone, padded, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_dynamic_ranges(exported):
    """Alone a row has the very range that the trained model gives it."""
    model = exported("dynamic")
    found = model.operators()
    # q, k, v, o, up and down of every layer, and the pooler.
    assert found["DynamicQuantizeMatMul"] == 6 * LAYERS + 1
    assert found["MatMulIntegerToFloat"] == found["QuantizeLinear"] == 0
    trained = model_logits(model.model, model.task, model.features, batch=1)
    spread = float(np.stack(trained).std())
    for one, other in zip(trained, model.logits(1), strict=True):
        assert np.abs(one - other).max() < 0.05 * spread


def test_operators_of_int8(exported):
    found, fused = exported("int8").operators(), exported("int8").operators(fused=True)
    assert found["MultiHeadAttention"] == LAYERS and found["QAttention"] == 0
    # The last layer's queries are one token's, and stay by themselves.
    assert fused["QAttention"] == LAYERS - 1 and fused["MultiHeadAttention"] == 1
    assert found["MatMulIntegerToFloat"] == 6 * LAYERS + 1
    assert fused["MatMulIntegerToFloat"] == 3 * LAYERS + 3 + 1
    for kind in (found, fused):
        # q, k and v share one.
        assert kind["QuantizeLinear"] == 4 * LAYERS + 1
        assert kind["MatMul"] + kind["Gemm"] == 1
        assert kind["SkipLayerNormalization"] == kind["GatherND"] == 0
        assert kind["LayerNormalization"] == 2 * LAYERS + 1


def test_operators_of_dense(exported):
    found = exported("dense").operators()
    assert found["MultiHeadAttention"] == LAYERS
    assert not {"QuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & set(found)


@pytest.mark.parametrize("fused", [False, True])
def test_residual_sums_stay_apart_from_norms(exported, fused, tmp_path):
    """onnxruntime's own optimiser neither merges them nor undoes the integer products."""
    model = exported("int8")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    path = model.fused if fused else model.path
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    after = {node.op_type for node in onnx.load(str(tmp_path / "o.onnx")).graph.node}
    assert {"LayerNormalization", "MatMulIntegerToFloat"} <= after
    assert "SkipLayerNormalization" not in after


def test_embeddings_and_weights_are_int8(exported):
    graph = onnx.load(str(exported("int8").path)).graph
    wide = [t for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]
    floating = [t for t in wide if t.data_type == onnx.TensorProto.FLOAT]
    assert [tuple(t.dims) for t in floating] == [(3, 32)] or [tuple(t.dims) for t in floating] == [(32, 3)]
    assert sum(t.data_type == onnx.TensorProto.INT8 for t in wide) == 3 + 6 * LAYERS + 1


def test_batch_and_length_are_dynamic(exported):
    session = onnxruntime.InferenceSession(str(exported("dense").path), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}
    for shape in ((1, 1), (1, 40), (7, 3)):
        feed = dict.fromkeys(names, np.ones(shape, np.int64))
        assert session.run(["logits"], feed)[0].shape == (shape[0], 3)


def test_weights_have_the_pruned_shapes(exported):
    """Nothing is masked in the file: the dead columns are gone."""
    graph = onnx.load(str(exported("pruned").path)).graph
    shapes = [tuple(t.dims) for t in graph.initializer if len(t.dims) == 2]
    for heads, neurons in ((3, 44), (2, 35)):
        assert sum(32 in s and heads * 8 in s for s in shapes) >= 4
        assert sum(32 in s and neurons in s for s in shapes) == 2


def test_weights_of_a_saved_graph_are_let_go_of(exported, tmp_path):
    """onnxscript's rewrite rules keep the last graph that they matched, and so all of its weights."""
    model = exported("dense")
    rows = [{k: v for k, v in f.items() if k != "labels"} for f in model.features[:2]]
    graph = to_graph(model.model, model.task.collate(rows))
    weights = [
        weakref.ref(tensor.raw)
        for value in graph.graph.initializers.values()
        if isinstance(getattr(tensor := value.const_value, "raw", None), torch.Tensor)
    ]
    save(graph, tmp_path / "model.onnx")
    assert len(weights) > 10 and all(one() is not None for one in weights)
    drop_weights(graph)
    del graph, tensor
    gc.collect()
    assert not [one for one in weights if one() is not None]
