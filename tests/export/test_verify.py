"""A file that does something else than the model is caught, and the layer is named."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compressft.evaluation.logits import model_logits, model_run
from compressft.evaluation.scores import Scores
from compressft.export.flow import Shipped, blame
from compressft.export.locate import diverging_layer
from compressft.export.verify import Comparison, Ran, verify
from compressft.recipe.parts import ExportConfig
from compressft.tasks import make_task

LIMITS = ExportConfig(batch=5)


def spoil(source, target, part: str) -> None:
    """Turn the sign of one weight inside a file."""
    graph = onnx.load(str(source))
    chosen = [t for t in graph.graph.initializer if part in t.name and len(t.dims) == 2]
    assert len(chosen) == 1, [t.name for t in graph.graph.initializer]
    values = numpy_helper.to_array(chosen[0])
    chosen[0].CopyFrom(numpy_helper.from_array(-values, chosen[0].name))
    onnx.save(graph, str(target))


def batch_of(model):
    rows = [{k: v for k, v in f.items() if k != "labels"} for f in model.features[:2]]
    return model.task.collate(rows)


@pytest.mark.parametrize("fused", [False, True])
def test_right_file_passes(exported, fused):
    model = exported("int8")
    path = model.fused if fused else model.path
    checks = verify(path, model.model, model.task, {"test": model.features}, LIMITS)
    ran = [(kernels, batch) for kernels in ("exact", "default") for batch in (1, 5)]
    assert [(c.kernels, c.batch) for c in checks] == ran
    assert all((c.split, c.rows, c.failure) == ("test", 12, None) for c in checks)
    assert all(c.label_agreement == 1.0 and c.torch == c.onnx for c in checks)
    assert "failure" not in checks[0].row()
    assert "all 2 layers agree" in diverging_layer(path, model.model, batch_of(model))


@pytest.mark.parametrize(
    ("part", "fused", "named"),
    [
        ("layer.0.output.dense", False, "bert.encoder.layer.0"),
        ("layer.1.output.dense", False, "bert.encoder.layer.1"),
        ("layer.1.attention.self.value", False, "bert.encoder.layer.1"),
        ("layer.0.attention.self.query.qkv_weight", True, "bert.encoder.layer.0"),
        ("layer.1.attention.self.query", True, "bert.encoder.layer.1"),
        ("layer.1.intermediate.dense", True, "bert.encoder.layer.1"),
        ("classifier", False, "the head after them differs"),
    ],
)
def test_wrong_file_is_caught_and_located(exported, tmp_path, part, fused, named):
    model = exported("int8")
    path = tmp_path / "model.onnx"
    spoil(model.fused if fused else model.path, path, part)
    checks = verify(path, model.model, model.task, {"test": model.features}, LIMITS)
    assert all(check.failure for check in checks)
    assert named in diverging_layer(path, model.model, batch_of(model))


def test_wrong_file_is_put_aside(exported, tmp_path):
    """The message has the figure, the split, the layer and the place; an older failure makes room."""
    model = exported("int8")
    for _ in range(2):
        (tmp_path / "onnx").mkdir()
        path = tmp_path / "onnx" / "model.onnx"
        spoil(model.path, path, "layer.1.output.dense")
        check = verify(path, model.model, model.task, {"test": model.features}, LIMITS)[0]
        shipped = Shipped(None, tmp_path, model.task, {"test": model.features}, {})
        message = blame(shipped, model.model, path.parent, check)
        assert (
            "bert.encoder.layer.1" in message
            and "(test, batch 1, exact kernels)" in message
            and "onnx.failed" in message
        )
        assert [p.name for p in tmp_path.iterdir()] == ["onnx.failed"]


# Figures of a comparison.


def outcome(trained, exported, limits=LIMITS, task="sequence-classification", labels=(0, 1, 0, 1), batch=2):
    made = make_task(task, SimpleNamespace(pad_token_id=0), 8, ["a", "b"] if task != "regression" else ())
    rows = [{"input_ids": [1], "attention_mask": [1], "labels": label} for label in labels]
    scores = Scores(made)
    comparison = Comparison(Ran("test", batch), made, scores)
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        one, other = np.array(trained[part]), np.array(exported[part])
        scores.add(torch.from_numpy(one), made.truth(rows[part]))
        comparison.add(one, other, rows[part])
    return comparison.check(limits)


RIGHT = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]


def test_compare_measures():
    check = outcome(RIGHT, [[1.25, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert check.max_abs_error == 1.0 and check.label_agreement == 0.75
    assert (check.torch, check.onnx) == (1.0, 0.75)
    assert (check.split, check.batch, check.rows) == ("test", 2, 4)
    assert "label agreement 0.7500 is below export.label_agreement 0.99" in check.failure


def test_compare_limits():
    shifted = [[a + 0.25, b] for a, b in RIGHT]
    assert outcome(RIGHT, shifted).failure is None
    assert "max_abs_error 0.1" in outcome(RIGHT, shifted, LIMITS.model_copy(update={"max_abs_error": 0.1})).failure
    loose = LIMITS.model_copy(update={"label_agreement": 0.5})
    assert "metric_drop" in outcome(RIGHT, [*RIGHT[:3], [1.0, 0.0]], loose).failure
    # A file that is better than the model by chance is no failure of the metric.
    assert outcome([*RIGHT[:3], [1.0, 0.0]], RIGHT, loose).failure is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_compare_refuses_what_is_not_finite(value):
    for row in range(4):
        wrong = [*RIGHT[:row], [value, 0.0], *RIGHT[row + 1 :]]
        assert "not finite" in outcome(RIGHT, wrong).failure


def test_compare_regression_by_error_and_correlation():
    limits = LIMITS.model_copy(update={"max_abs_error": 0.5})
    truth = [[0.0], [1.0], [2.0], [3.0]]
    near, far = [[0.1], [1.1], [2.1], [3.1]], [[3.0], [1.0], [2.0], [0.0]]
    labels = (0.0, 1.0, 2.0, 3.0)
    check = outcome(truth, near, limits, "regression", labels)
    assert check.label_agreement is None and check.failure is None
    assert outcome(truth, far, limits, "regression", labels).failure is not None


@pytest.mark.parametrize("kind", ["tokens", "llama"])
def test_figures_of_batches_are_those_of_all_logits(exported, kind):
    """Differences, agreement and metric, from logits that are held all at once."""
    model = exported(kind)
    trained, file = model_logits(model.model, model.task, model.features), model.logits(1)
    check = verify(model.path, model.model, model.task, {"test": model.features}, LIMITS)[0]
    assert (check.kernels, check.batch) == ("exact", 1)
    assert check.max_abs_error == pytest.approx(
        max(np.abs(a - b).max() for a, b in zip(trained, file, strict=True)), rel=0.2
    )
    same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in zip(trained, file, strict=True)])
    assert check.label_agreement == same.mean()
    for rows, found in ((trained, check.torch), (file, check.onnx)):
        scores = Scores(model.task)
        for row, feature in zip(rows, model.features, strict=True):
            scores.add(torch.from_numpy(row[None]), torch.tensor([feature["labels"]]))
        assert found == pytest.approx(scores.metrics()[model.task.metric], rel=1e-5)


def test_verification_holds_a_batch_of_logits(exported, monkeypatch):
    """Four rows at a time, of twelve, go through either model."""
    model = exported("llama")
    seen = []

    def counting(module, task):
        run = model_run(module, task)
        return lambda rows: seen.append(len(rows)) or run(rows)

    monkeypatch.setattr("compressft.export.verify.model_run", counting)
    checks = verify(model.path, model.model, model.task, {"test": model.features}, ExportConfig(batch=4))
    assert seen == [4, 4, 4]
    assert [check.rows for check in checks] == [12] * 4
