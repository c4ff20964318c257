"""Two phases: terms inside the models first, then task and logits; a pure function of progress."""

import pytest
import torch

from compressft.objectives.distill import Distill
from tests.objectives.pair import prepared, terms
from tests.tiny import fit, labelled, tiny

INSIDE = {"distill.hidden", "distill.attention", "distill.relations", "distill.cosine"}
TWO = Distill(
    teacher="t", task=0.7, hidden=1.0, attention=1.0, relations=1.0, cosine=1.0, intermediate_until=0.4, temperature=1.0
)


def test_terms_and_task_by_progress():
    student, batch = tiny(), labelled(4)
    context = prepared(TWO, student, tiny(seed=1))
    for progress, inside in ((None, True), (0.0, True), (0.39, True), (0.4, False), (1.0, False), (0.1, True)):
        if progress is not None:
            TWO.after_step(student, progress)
        assert set(terms(TWO, student, batch, context)) == (INSIDE if inside else {"distill.logits"})
        assert TWO.task_weight(student) == (0.0 if inside else 0.7)


def test_without_it_all_terms_are_there_all_the_time():
    student, batch = tiny(), labelled(4)
    one = TWO.model_copy(update={"intermediate_until": None})
    context = prepared(one, student, tiny(seed=1))
    for progress in (0.0, 0.39, 0.4, 1.0):
        one.after_step(student, progress)
        assert set(terms(one, student, batch, context)) == {*INSIDE, "distill.logits"}
        assert one.task_weight(student) == 0.7


def test_the_second_phase_keeps_nothing_of_the_inside(monkeypatch):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    asked = []
    forward = teacher.forward
    monkeypatch.setattr(teacher, "forward", lambda **kwargs: asked.append(kwargs) or forward(**kwargs))
    context = prepared(TWO, student, teacher)
    terms(TWO, student, batch, context)
    TWO.after_step(student, 0.5)
    outputs = student(**batch)
    assert not hasattr(outputs, "attended")
    TWO.loss(student, batch, outputs, context)
    assert [kwargs["output_hidden_states"] for kwargs in asked] == [True, False]


def test_a_phase_without_terms_asks_no_teacher(monkeypatch):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    objective = Distill(teacher="t", logits=0.0, hidden=1.0, intermediate_until=0.5)
    context = prepared(objective, student, teacher)
    objective.after_step(student, 0.5)
    monkeypatch.setattr(teacher, "forward", None)
    assert terms(objective, student, batch, context) == {} and objective.task_weight(student) == 0.5


def test_the_head_rests_in_the_first_phase():
    student, batch = tiny(), labelled(8)
    objective = Distill(teacher="t", hidden=1.0, intermediate_until=0.5)
    context = prepared(objective, student, tiny(seed=1))
    (student(**batch).loss * objective.task_weight(student)).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    before = student.classifier.weight.detach().clone()
    objective.after_step(student, 1.0)
    fit(student, [objective], [batch], steps=8, context=context)
    assert not torch.equal(student.classifier.weight, before)


@pytest.mark.parametrize("until", [0.0, 1.0, 1.5])
def test_the_switch_is_inside_the_run(until):
    with pytest.raises(ValueError, match="intermediate_until"):
        Distill(teacher="t", hidden=1.0, intermediate_until=until)
