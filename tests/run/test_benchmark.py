"""Benchmarks: arguments are checked before anything is measured, and one small real measurement of each kind."""

from __future__ import annotations

import pytest
from onnx import TensorProto, checker, helper, save

from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.run.benchmark import edge, parse_shape, training
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory):
    """A folder with a `model.onnx` that takes token ids and a mask."""
    folder = tmp_path_factory.mktemp("onnx")
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "t"]) for name in ("input_ids", "attention_mask")
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.INT64, ["b", "t"])
    graph = helper.make_graph([helper.make_node("Mul", [i.name for i in inputs], ["logits"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(("text", "shape"), [("1x128", (1, 128)), ("8x32", (8, 32))])
def test_shapes(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "8", "8x", "x8", "0x8", "8x0", "-1x8", "8 x 8", "8x8x8", "8X8", "1.5x8"])
def test_shape_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="wants BATCHxLENGTH, such as 1x128") as caught:
        parse_shape(text)
    assert repr(text) in str(caught.value)


def test_edge_measures_every_shape(onnx_folder):
    rows = edge([onnx_folder], ["1x4", "2x8"], 1, 1)
    assert [(row["model"], row["batch"], row["length"]) for row in rows] == [
        (str(onnx_folder), 1, 4),
        (str(onnx_folder), 2, 8),
    ]
    for row in rows:
        assert (row["runtime"], row["threads"]) == ("onnxruntime", 1)
        assert 0 < row["p50"] <= row["p90"]


@pytest.mark.parametrize("missing", ["nowhere.onnx", "."])
def test_edge_of_a_missing_file_is_refused(tmp_path, missing):
    with pytest.raises(UserError, match=r"does not exist; give an ONNX file or a folder with model.onnx"):
        edge([tmp_path / missing], ["1x4"], 1, 1)


def test_edge_of_a_file_that_is_no_onnx_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("not ONNX")
    with pytest.raises(UserError) as caught:
        edge([path], ["1x4"], 1, 1)
    message = str(caught.value)
    assert message.startswith("benchmark edge: ")
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(("batch_size", "stages"), [(8, 3), (500, 1)])
def test_training_measures_every_stage(tmp_path, batch_size, stages):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(40))
    held = write_jsonl(tmp_path / "held.jsonl", rows_of(8))
    chosen = document(save_tiny(tmp_path / "model"), data)
    chosen["data"]["validation"] = str(held)
    train = {"batch_size": batch_size}
    passes = [{"type": "structured", "heads": 0.5, "ffn": 0.5}, "int8"]
    objectives = [{"type": "distill", "teacher": "teacher", "hidden": 1.0}]
    chosen["stages"] = [
        {"name": "teacher", "train": train},
        {"name": "student", "train": train, "passes": passes, "objectives": objectives},
        {"name": "adapted", "train": train, "method": "adapter"},
    ][:stages]
    rows = training(parse_recipe(chosen), steps=2)
    assert [row["stage"] for row in rows] == ["teacher", "student", "adapted"][:stages]
    for row in rows:
        # 1000 / ms steps per second, each of the batch size (all 40 rows where a batch would hold more).
        assert row["examples_per_second"] == pytest.approx(min(batch_size, 40) * 1000 / row["step_ms"])
        # Texts have 2 to 9 words and two special tokens.
        assert 4 <= row["tokens_per_second"] / row["examples_per_second"] <= 16
        assert row["peak_memory_mib"] > 0
    if stages == 3:
        assert rows[2]["trainable"] < rows[0]["trainable"] <= rows[1]["trainable"]
