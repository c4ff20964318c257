"""The exported int8 forms on processors that this machine may not be: with saturating 16-bit sums, and without."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.portable.lack import Lack
from benchmarks.portable.machines import picked
from benchmarks.portable.run import Place, answered
from compressft.evaluation.logits import model_logits

pytestmark = pytest.mark.full

# One flipped rounding moves a logit by about a per cent of their spread; a saturated sum by far more.
LIMIT = 0.05


@pytest.fixture(scope="module", params=["haswell", "nehalem"])
def place(request, tmp_path_factory):
    """The real onnxruntime under qemu: AVX2 without VNNI, or neither."""
    (machine,), folder = picked([request.param]), tmp_path_factory.mktemp(request.param)
    try:
        return Place(machine, machine.prepare(folder), folder)
    except Lack as lack:
        pytest.skip(f"lacks {lack}")


@pytest.mark.parametrize("kind", ["int8", "dynamic", "tokens"])
def test_logits_are_the_trained_ones(exported, kind, place):
    model = exported(kind)
    rows = [{k: v for k, v in feature.items() if k != "labels"} for feature in model.features]
    size = 1 if kind == "int8" else len(rows)
    batches = [model.task.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    answer = answered(
        model.fused or model.path, [{k: v.tolist() for k, v in batch.items()} for batch in batches], place
    )
    assert answer["saturates"] == (place.machine.name == "haswell")
    got = [np.array(row) for batch in answer["logits"] for row in batch]
    if kind == "dynamic":
        # One range a batch: rows are compared in the batch that they were in.
        trained = model_logits(model.model, model.task, model.features, len(rows))
    else:
        trained = model_logits(model.model, model.task, model.features)
    spread = np.concatenate([np.ravel(row) for row in trained]).std()
    for want, row in zip(trained, got, strict=True):
        row = row[: len(want)] if want.ndim == 2 else row
        assert np.abs(want - row).max() <= LIMIT * spread
        assert np.array_equal(want.argmax(-1), row.argmax(-1))
