"""Distillation: KL and its gradient, temperature, paddings, teachers, layer maps, and other tasks."""

import copy

import pytest
import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.modules.linear import CompressedLinear
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.layer_map import uniform
from compressft.objectives.distillation.losses import kl_divergence
from compressft.passes.int8 import Int8
from compressft.transform import Context
from tests.tiny import fit, gated, labelled, padded, random_keep, tiny


def draws(rows=6, classes=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [scale * torch.randn(rows, classes, generator=generator) for _ in range(2)]


def gradient(student, teacher, temperature):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(kl_divergence(leaf, teacher, temperature), leaf)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 20.0])
def test_equal_logits_give_nothing(temperature):
    student, _ = draws()
    # A constant per row does not change the distribution.
    for teacher in (student, student + torch.arange(6.0)[:, None]):
        assert abs(kl_divergence(student, teacher, temperature).item()) < 1e-4
        assert gradient(student, teacher, temperature).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_equals_the_formula(temperature):
    student, teacher = (t.double() for t in draws())
    p, q = (torch.softmax(t / temperature, -1) for t in (teacher, student))
    want = temperature**2 * (p * (p.log() - q.log())).sum() / len(student)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), want)
    module = nn.KLDivLoss(reduction="batchmean")
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), temperature**2 * module(q.log(), p))
    torch.testing.assert_close(gradient(student, teacher, temperature), temperature * (q - p) / len(student))


def test_the_gradient_does_not_fade_with_temperature():
    student, teacher = draws(scale=0.5)
    warm, hot = (gradient(student, teacher, t) for t in (5.0, 50.0))
    assert (warm - hot).norm() < 0.1 * hot.norm()
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / difference.numel()
    assert (hot - limit).norm() < 0.02 * limit.norm()


def context(teacher):
    return Context(load_teacher=lambda name: teacher)


def terms(objective, student, batch, ctx):
    outputs = student(**batch, output_hidden_states=objective.needs_hidden_states)
    return objective.loss(student, batch, outputs, ctx)


def prepared(objective, student, teacher):
    ctx = context(teacher)
    objective.prepare(student, ctx)
    return ctx


BOTH = Distill(teacher="t", logits=0.3, hidden=2.0, task=0.7, temperature=3.0)


def test_weighted_terms():
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    got = terms(BOTH, student, batch, prepared(BOTH, student, teacher))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    hidden = [
        (a[mask] - b[mask]).square().mean() for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)
    ]
    assert set(got) == {"distill.logits", "distill.hidden"}
    torch.testing.assert_close(got["distill.logits"], 0.3 * kl_divergence(ours.logits, theirs.logits, 3.0))
    torch.testing.assert_close(got["distill.hidden"], 2.0 * torch.stack(hidden).mean())
    assert BOTH.task_weight(student) == 0.7 and BOTH.needs_hidden_states


def test_terms_of_weight_zero_cost_nothing():
    student = tiny()
    objective = Distill(teacher="t", logits=0.0, hidden=0.0)
    assert not objective.needs_hidden_states
    assert terms(objective, student, labelled(4), prepared(objective, student, tiny(seed=1))) == {}


def test_more_padding_changes_nothing():
    student, batch = tiny(), labelled(4)
    ctx = prepared(BOTH, student, tiny(seed=1))
    wide = {n: torch.nn.functional.pad(v, (0, 5)) if v.dim() == 2 else v for n, v in batch.items()}
    narrow, padded_more = terms(BOTH, student, batch, ctx), terms(BOTH, student, wide, ctx)
    for name, value in narrow.items():
        torch.testing.assert_close(padded_more[name], value, atol=1e-6, rtol=1e-5)


def test_the_teacher_is_left_alone():
    student, teacher = tiny(), tiny(seed=1).train()
    before = copy.deepcopy(teacher.state_dict())
    ctx = prepared(BOTH, student, teacher)
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    fit(student, [BOTH], [labelled(4)], steps=3, context=ctx)
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training


def test_the_student_approaches_the_teacher():
    objective = Distill(teacher="t", task=0.0, logits=1.0, temperature=1.0)
    student, teacher, batch = tiny(), tiny(seed=1), labelled(8)
    ctx = prepared(objective, student, teacher)
    before = terms(objective, student, batch, ctx)["distill.logits"].item()
    fit(student, [objective], [batch], steps=30, context=ctx, learning_rate=3e-3)
    assert terms(objective, student, batch, ctx)["distill.logits"].item() < 0.3 * before


def test_one_teacher_is_loaded_once():
    loads = []
    ctx = Context(load_teacher=lambda name: loads.append(name) or tiny(seed=1))
    for _ in range(2):
        Distill(teacher="t").prepare(tiny(), ctx)
    assert loads == ["t"]
    earlier = tiny(seed=2)
    ctx.teachers["dense"] = earlier
    Distill(teacher="dense").prepare(tiny(), ctx)
    assert loads == ["t"] and ctx.teachers["dense"] is earlier


def test_layer_map():
    student, teacher, batch = tiny(), tiny(seed=1, num_hidden_layers=4), labelled(4)
    assert uniform(2, 4) == ((0, 0), (1, 2), (2, 4))
    assert uniform(6, 6) == tuple((i, i) for i in range(7))
    assert uniform(4, 12) == ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))
    own = Distill(teacher="t", logits=0.0, hidden=1.0, layer_map=((1, 1), (2, 4)))
    got = terms(own, student, batch, prepared(own, student, teacher))["distill.hidden"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    want = sum((ours[s][mask] - theirs[t][mask]).square().mean() for s, t in ((1, 1), (2, 4))) / 2
    torch.testing.assert_close(got, want)
    for pair in ((3, 1), (1, 5)):
        beyond = Distill(teacher="t", hidden=1.0, layer_map=(pair,))
        with pytest.raises(UserError, match=rf"layer_map: pair \[{pair[0]}, {pair[1]}\] is beyond the models' 2 and 4"):
            prepared(beyond, student, teacher)


def test_other_widths_matter_for_hidden_states_only():
    student, teacher = tiny(), tiny(seed=1, hidden_size=16)
    with pytest.raises(UserError, match=r"projection: student width 32 and teacher width 16 differ; use shared or"):
        prepared(BOTH.model_copy(update={"projection": "none"}), student, teacher)
    objective = Distill(teacher="t")
    assert terms(objective, student, labelled(4), prepared(objective, student, teacher))["distill.logits"] > 0
    assert not len(student.distillation.projections)


@pytest.mark.parametrize("training", [True, False])
def test_self_is_the_same_weights_uncompressed(training):
    student, twin, batch = tiny(), tiny(), labelled(4)
    gated(student, random_keep(student))
    Int8().prepare(student, Context())
    student.train()(**batch)
    student.train(training)
    objective = Distill(teacher="self", logits=0.5, hidden=1.0)
    ctx = Context(load_teacher=None)
    objective.prepare(student, ctx)
    assert ctx.teachers == {}, "no second model"
    ranges = {n: v.clone() for n, v in student.state_dict().items() if "quantizer" in n}
    outputs = student(**batch, output_hidden_states=True)
    moved = {n: v.clone() for n, v in student.state_dict().items() if "quantizer" in n}
    got = objective.loss(student, batch, outputs, ctx)
    assert student.training == training and all(m.training == training for m in student.modules())
    assert all(torch.equal(student.state_dict()[n], v) for n, v in moved.items()), "the teacher's pass is not observed"
    assert training != all(torch.equal(moved[n], v) for n, v in ranges.items())
    theirs = twin(**{n: v for n, v in batch.items() if n != "labels"}, output_hidden_states=True)
    torch.testing.assert_close(got["distill.logits"], 0.5 * kl_divergence(outputs.logits, theirs.logits, 2.0))
    mask = batch["attention_mask"].bool()
    hidden = [
        (a[mask] - b[mask]).square().mean() for a, b in zip(outputs.hidden_states, theirs.hidden_states, strict=True)
    ]
    torch.testing.assert_close(got["distill.hidden"], torch.stack(hidden).mean())
    assert got["distill.logits"] > 1e-3


def test_self_of_an_uncompressed_model_is_silent():
    student = tiny()
    for layer in anatomy(student).layers:
        assert not isinstance(layer.part(layer.family.o), CompressedLinear)
    objective = Distill(teacher="self", hidden=1.0)
    got = terms(objective, student, labelled(4), prepared(objective, student, None))
    assert all(abs(value.item()) < 1e-6 for value in got.values())


def test_regression_compares_numbers():
    student, teacher = (tiny(seed=s, num_labels=1, problem_type="regression") for s in (0, 1))
    batch = {**padded(), "labels": torch.rand(4)}
    objective = Distill(teacher="t", logits=0.5)
    got = terms(objective, student, batch, prepared(objective, student, teacher))["distill.logits"]
    values = [m(**padded()).logits for m in (student, teacher)]
    torch.testing.assert_close(got, 0.5 * (values[0] - values[1]).square().mean())
    assert got > 0


@pytest.mark.parametrize("labels", [True, False])
def test_token_tasks_use_labelled_positions(labels):
    student, teacher = (tiny(seed=s, architecture="BertForTokenClassification") for s in (0, 1))
    batch = padded()
    keep = batch["attention_mask"].bool()
    if labels:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        batch["labels"][:, 1:3] = 2
        batch["labels"][3, 2] = -100
        keep = batch["labels"] != -100
    objective = Distill(teacher="t", logits=1.0, temperature=2.0)
    got = terms(objective, student, batch, prepared(objective, student, teacher))["distill.logits"]
    values = [m(**padded()).logits[keep] for m in (student, teacher)]
    assert values[0].shape[0] == (7 if labels else int(batch["attention_mask"].sum()))
    torch.testing.assert_close(got, kl_divergence(*values, 2.0))
