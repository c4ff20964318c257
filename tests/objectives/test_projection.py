"""Learned projections between widths: trained with the student, in its checkpoints, gone from what ships."""

import pytest
import torch
from safetensors.torch import load_file

from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.objectives.distill import Distill
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.objectives.pair import asked, prepared, terms
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny


def wide(**changes):
    return tiny(seed=1, hidden_size=48, **changes)


def test_terms_equal_the_formula():
    student, teacher, batch = tiny(), wide(), labelled(4)
    objective = Distill(teacher="t", logits=0.0, hidden=2.0, cosine=3.0)
    got = terms(objective, student, batch, prepared(objective, student, teacher))
    (projection,) = student.distillation.projections.values()
    assert projection.weight.shape == (48, 32) and projection.bias.shape == (48,)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    pairs = [(a[mask] @ projection.weight.T + projection.bias, b[mask]) for a, b in zip(ours, theirs, strict=True)]
    want = sum((a - b).square().mean() for a, b in pairs) / 3
    torch.testing.assert_close(got["distill.hidden"], 2.0 * want)
    cosine = torch.nn.functional.cosine_similarity(*pairs[-1], dim=-1)
    torch.testing.assert_close(got["distill.cosine"], 3.0 * (1.0 - cosine.mean()))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"hidden": 1.0}, ["shared"]),
        ({"hidden": 1.0, "projection": "pair"}, ["0", "1", "2"]),
        ({"hidden": 1.0, "projection": "pair", "layer_map": [[1, 2]]}, ["1"]),
        ({"hidden": 1.0, "projection": "pair", "layer_map": "learned"}, ["0", "1", "2"]),
        ({"hidden": 1.0, "cosine": 1.0, "projection": "pair", "layer_map": [[1, 2]]}, ["1", "2"]),
        ({"cosine": 1.0, "projection": "pair"}, ["2"]),
        ({"logits": 1.0}, []),
    ],
)
def test_which_projections_there_are(fields, names):
    student = tiny()
    objective = Distill(**{"teacher": "t", "logits": 0.0, **fields})
    context = prepared(objective, student, wide())
    assert list(student.distillation.projections) == names
    got = terms(objective, student, labelled(4), context)
    sum(got.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in student.distillation.parameters())


def test_a_projection_between_equal_widths_is_a_choice():
    student, teacher = tiny(), tiny(seed=1)
    prepared(Distill(teacher="t", hidden=1.0), student, teacher)
    assert not len(student.distillation.projections)
    other = tiny()
    prepared(Distill(teacher="t", hidden=1.0, projection="shared"), other, teacher)
    assert list(other.distillation.projections) == ["shared"]


def test_drawn_from_the_stages_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        student = tiny()
        prepared(Distill(teacher="t", hidden=1.0), student, wide(), seed=seed)
        weights.append(student.distillation.projections["shared"].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("family", TINY)
def test_families(family):
    changes = {"dim": 48} if family == "distilbert" else {"n_embd": 48} if family == "gpt2" else {"hidden_size": 48}
    got = asked(tiny(family), tiny(family, seed=1, **changes), batch_for(family), hidden=1.0, cosine=1.0)
    assert len(got) == 2 and all(value > 1e-2 for value in got.values())


def test_trained_and_gone_from_what_ships(tmp_path):
    student, teacher, batch = tiny(), wide(), labelled(8)
    objective = Distill(teacher="t", hidden=1.0)
    context = prepared(objective, student, teacher)
    before = student.distillation.projections["shared"].weight.detach().clone()
    first = terms(objective, student, batch, context)["distill.hidden"].item()
    fit(student, [objective], [batch], steps=30, context=context)
    assert terms(objective, student, batch, context)["distill.hidden"].item() < 0.5 * first
    assert not torch.equal(student.distillation.projections["shared"].weight, before)
    assert "distillation.projections.shared.weight" in student.state_dict()
    want = logits(student, batch)
    objective.finalize(student)
    assert torch.equal(logits(student, batch), want)
    assert not any("distillation" in name for name in student.state_dict())
    save_compressed(student, None, tmp_path / "model", {})
    assert not any("distillation" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    assert not (tmp_path / "model" / "compressft.safetensors").exists()
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch), want)


def test_beside_structured_pruning():
    """Gates leave the states' width alone until the end."""
    student, teacher, batch = tiny(), wide(), labelled(8)
    prune = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)
    objective = Distill(teacher="t", hidden=1.0, attention=1.0, relations=1.0)
    transforms = [objective, prune]
    context = Context(transforms=transforms, load_teacher=lambda name: teacher)
    for transform in transforms:
        transform.prepare(student, context)
    fit(student, transforms, [batch], steps=6, context=context)
    want = logits(student, batch)
    for transform in transforms:
        transform.finalize(student)
    torch.testing.assert_close(logits(student, batch), want, atol=1e-5, rtol=1e-4)
