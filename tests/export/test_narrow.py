"""Exported files of models that lost layers and hidden dimensions."""

import pytest

from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.tasks import make_task
from compressft.transform import Context
from tests.export.conftest import Exported, Pads, rows_for
from tests.share import drawn
from tests.tiny import fit, tiny

pytestmark = pytest.mark.dear

QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CASES = {
    "electra, int8": ("electra", "sequence-classification", "static", {**QUIET, "num_hidden_layers": 4}),
    "gpt2": ("gpt2", "causal-lm", None, {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}


@pytest.mark.parametrize("case", drawn(1, CASES))
def test_file_equals_model(case, tmp_path):
    family, kind, int8, changes = CASES[case]
    task = make_task(kind, Pads(), 16, ["a", "b", "c"] if kind != "causal-lm" else [])
    model, features = tiny(family, **changes), rows_for(task, kind == "causal-lm")
    structured = Structured(
        heads=0.5, ffn=0.4, layers=0.5, hidden=0.4, align=4, floor_ffn=4, align_hidden=4, start=0.0, end=0.5
    )
    transforms = [structured, Int8(ranges=int8)] if int8 else [structured]
    for transform in transforms:
        transform.prepare(model, Context())
    fit(model, transforms, [task.collate([dict(f) for f in features])], 4)
    for transform in transforms:
        transform.finalize(model)
    found = Exported(model, task, features, tmp_path, fuses=int8 is not None)
    limit = 0.05 if int8 else 1e-4
    assert found.error(1) < limit and found.error(5) < limit
    if int8:
        assert found.error(5, fused=True) < limit
