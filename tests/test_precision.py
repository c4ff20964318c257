"""Training in bf16 on any processor: what a fast one chooses by itself must not fail first there."""

import pytest
import torch

from compressft.objectives import OBJECTIVES
from compressft.objectives.distill import Distill
from compressft.passes import PASSES
from tests.objectives.pair import prepared
from tests.test_together import method_for, rows, stage_of, trained  # noqa: F401 - rows is a fixture
from tests.tiny import fit, labelled, tiny


def check(model):
    floating = [p for p in model.parameters() if p.is_floating_point()]
    assert floating and all(p.dtype is torch.float32 and p.isfinite().all() for p in floating)


@pytest.mark.parametrize("one", PASSES)
def test_every_pass(one, rows):  # noqa: F811
    model, _, _, after = trained(stage_of(method_for(one), [one]), rows, steps=2, dtype=torch.bfloat16)
    assert all(torch.tensor(row).isfinite().all() for row in after)
    check(model)


@pytest.mark.parametrize("one", OBJECTIVES)
def test_every_objective(one, rows):  # noqa: F811
    check(trained(stage_of("full", [], [one]), rows, steps=2, dtype=torch.bfloat16)[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_kept_answers(precision, tmp_path):
    objective = Distill(teacher="t", hidden=1.0, cosine=1.0, cache=True, cache_precision=precision)
    student = tiny()
    context = prepared(objective, student, tiny(seed=1), folder=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        fit(student, [objective], [labelled(4, seed=1), labelled(4, seed=2)], 4, context=context)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2
    check(student)
