"""The proof that no 16-bit sum saturates: bounds against brute force, every form that is written, and what is said."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.export.portable import LIMIT, largest_pair_sum, model_portability, portability
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.transform import Context
from tests.tiny import fit, labelled, tiny


def brute_force(weight):
    """Every pair with inputs at both ends of u8."""
    weight = np.pad(weight.astype(np.int64), ((0, len(weight) % 2), (0, 0)))
    ends = [(a, b) for a in (0, 255) for b in (0, 255)]
    pairs = zip(weight[0::2], weight[1::2], strict=True)
    return max(int(np.abs(a * first + b * second).max()) for first, second in pairs for a, b in ends)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (7, 5), (64, 33)])
def test_bound_is_what_inputs_can_reach(shape):
    generator = np.random.default_rng(shape[0])
    for _ in range(5):
        weight = generator.integers(-127, 128, shape).astype(np.int8)
        assert largest_pair_sum(weight) == brute_force(weight)
    assert largest_pair_sum(np.full((2, 1), -128, np.int8)) == 255 * 256 > LIMIT


def file_of(nodes, values, path):
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(path))
    return path


SCALARS = {"s": np.float32(0.1), "z": np.uint8(3)}
FULL = np.full((4, 6), 127, np.int8)


@pytest.mark.parametrize("kind", ["MatMulIntegerToFloat", "DynamicQuantizeMatMul", "qdq", "gemm"])
@pytest.mark.parametrize("width", [64, 127])
def test_foreign_files_are_bounded_by_their_weights(kind, width, tmp_path):
    weight = np.full((4, 6), width, np.int8)
    quantise = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    microsoft = {"domain": "com.microsoft"}
    dequantise = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["b"]),
    ]
    if kind == "gemm":
        # Its weight is (out, in) here: pairs lie along the other axis.
        weight = np.zeros((6, 4), np.int8)
        weight[0, :2] = width
    nodes = {
        "MatMulIntegerToFloat": [quantise, helper.make_node(kind, ["q", "w", "s", "s", "z"], ["y"], **microsoft)],
        "DynamicQuantizeMatMul": [helper.make_node(kind, ["x", "w", "s"], ["y"], **microsoft)],
        "qdq": [quantise, *dequantise, helper.make_node("MatMul", ["a", "b"], ["y"])],
        "gemm": [quantise, *dequantise, helper.make_node("Gemm", ["a", "b"], ["y"], transB=1)],
    }[kind]
    proof = portability(file_of(nodes, {"w": weight, **SCALARS}, tmp_path / "model.onnx"))
    assert [one.largest for one in proof.sums] == [2 * 255 * width]
    assert proof.portable == (width == 64) == (proof.warning() is None)


def test_unsigned_and_floating_weights_are_no_pair_sums_and_unknown_ones_no_proof(tmp_path):
    node = helper.make_node("MatMulInteger", ["q", "w"], ["i"])
    rest = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node,
        helper.make_node("Cast", ["i"], ["y"], to=1),
    ]
    unsigned = portability(file_of(rest, {"w": FULL.astype(np.uint8), **SCALARS}, tmp_path / "unsigned.onnx"))
    assert unsigned.portable and not unsigned.sums
    floating = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert not portability(file_of(floating, {"w": FULL.astype(np.float32)}, tmp_path / "floating.onnx")).sums
    computed = [rest[0], helper.make_node("QuantizeLinear", ["v", "s"], ["w"]), *rest[1:]]
    unknown = portability(file_of(computed, {"v": np.ones((4, 6), np.float32), **SCALARS}, tmp_path / "unknown.onnx"))
    assert not unknown.portable and "an unknown value" in unknown.warning()


@pytest.mark.parametrize("level", [0, 4])
def test_inputs_that_the_runtime_rounds_by_its_own_rules_are_named(level, tmp_path):
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], **nbits(level), domain="com.microsoft")
    packed = {"w": np.zeros((6, 1, 16), np.uint8), "s": np.ones((6, 1), np.float32)}
    proofs = portability(file_of([node], packed, tmp_path / "model.onnx")), model_portability(in_four_bits(level))
    for proof in proofs:
        assert not proof.saturates and not proof.sums
        assert proof.portable == (level == 0) == (not proof.rounded) == (proof.warning() is None)
    if level:
        assert "int4.accuracy_level 0" in proofs[0].warning() and "1 4-bit layer " in proofs[0].warning()
        assert len(proofs[1].rounded) == 6 * 2 + 1


def nbits(level):
    return {"K": 32, "N": 6, "bits": 4, "block_size": 32} | ({"accuracy_level": level} if level else {})


def in_four_bits(level):
    model = tiny()
    Int4(accuracy_level=level, embeddings="none").prepare(model, Context())
    return model


@pytest.mark.parametrize("kind", ["int8", "dynamic"])
def test_what_is_written_is_portable(exported, kind):
    model = exported(kind)
    for path in filter(None, (model.path, model.fused)):
        proof = portability(path)
        assert proof.sums and proof.portable
        assert max(one.largest for one in proof.sums) > LIMIT - 3 * 255
    named = {one.layer for one in portability(model.path).sums}
    assert named == {one.layer for one in model_portability(model.model).sums}


def quantised(ranges="dynamic", **fields):
    model = tiny()
    one = Int8(ranges=ranges, **fields)
    one.prepare(model, Context())
    fit(model, [one], [labelled()], 1, 1e-4)
    one.finalize(model)
    return model


@pytest.mark.full
def test_standard_operators_are_proved_too(tmp_path):
    model = quantised("static", format="qdq")
    inputs = {k: v for k, v in labelled().items() if k != "labels"}
    save(to_graph(fold(model), inputs), tmp_path / "model.onnx")
    proof = portability(tmp_path / "model.onnx")
    assert proof.portable and {one.layer for one in proof.sums} == {one.layer for one in model_portability(model).sums}


def test_all_eight_bits_are_named_and_how_far_they_go():
    proof = model_portability(quantised(target="vnni"))
    assert not proof.portable and len(proof.beyond) > 5
    worst = proof.beyond[0]
    assert worst.largest == max(one.largest for one in proof.sums) > LIMIT
    assert proof.rows() == {
        "portable": False,
        "pair_sums": {
            "products": len(proof.sums),
            "largest": worst.largest,
            "limit": LIMIT,
            "beyond": {one.layer: one.largest for one in proof.beyond},
        },
    }
    said = proof.warning()
    assert f"{worst.layer}: {worst.largest:,}" in said and "AVX2" in said and "int8.target any" in said
    assert model_portability(quantised(weight_bits=7)).portable and model_portability(quantised()).portable
