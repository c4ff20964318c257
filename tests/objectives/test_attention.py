"""Attention and relation terms in real models: what is recorded is what eager attention computes, and nothing more."""

import pytest
import torch
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.shrink import shrink
from compressft.model.surgery import checkpoint_activations
from compressft.modules import attention as module
from compressft.modules.attention import Recorder, recording
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.losses import HIDDEN, scores, visible
from compressft.objectives.distillation.teacher import attention_modules
from tests.objectives.pair import asked, prepared, terms
from tests.tiny import SHAPE, TINY, batch_for, fit, labelled, logits, padded, random_keep, tiny

BOTH = {"attention": 1.0, "relations": 1.0}


def inputs_of(family, left):
    batch = batch_for(family)
    return {name: value.flip(1) for name, value in batch.items()} if left else batch


def recorded(model, batch, layers=(1, 2)):
    recorder = Recorder(attention_modules(model, set(layers)))
    with recording(recorder):
        model(**batch)
    return recorder.taken


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", TINY)
def test_recorded_scores_are_those_of_eager_attention(family, left):
    batch = inputs_of(family, left)
    taken = recorded(tiny(family), batch)
    eager = tiny(family, attention="eager")
    with torch.no_grad():
        want = eager(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    assert sorted(taken) == [1, 2]
    for layer, seen in taken.items():
        assert seen.query.shape[1] == SHAPE[family][0] and seen.key.shape[1] == SHAPE[family][1]
        where = visible(seen, real)
        got = scores(seen).masked_fill(~where, HIDDEN).softmax(-1)
        rows = real[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[rows], want[layer - 1][rows], atol=1e-5, rtol=1e-4)


def test_a_window_is_part_of_what_is_seen():
    batch = {name: value[:1] for name, value in padded().items()}
    model = tiny("mistral", sliding_window=3)
    seen = recorded(model, batch)[1]
    where = visible(seen, batch["attention_mask"].bool())[0, 0]
    assert where.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3, 3]


def test_only_asked_layers_are_recorded_and_only_inside():
    model, batch = tiny(num_hidden_layers=4), padded()
    assert sorted(recorded(model, batch, (2, 4))) == [2, 4]
    recorder = Recorder(attention_modules(model, {1}))
    model(**batch)
    assert not recorder.taken


def test_a_prefix_before_the_keys_is_left_out():
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = torch.ones(2, 1, 5, 7).bool()
    place = torch.nn.Identity()
    place.is_causal = False
    recorder = Recorder({place: 3})
    with recording(recorder):
        module.attention(place, query, key, value, mask, scaling=0.5)
    seen = recorder.taken[3]
    assert torch.equal(seen.key, key[:, :, 2:]) and torch.equal(seen.value, value[:, :, 2:])
    assert seen.mask.shape == (2, 1, 5, 5) and seen.scaling == 0.5


@pytest.mark.parametrize("family", TINY)
def test_families_learn_from_a_teacher_of_their_own(family):
    """Terms are positive, gradients finite and in every distilled projection; a copy is at no distance."""
    student, teacher, batch = tiny(family), tiny(family, seed=1), batch_for(family)
    got = asked(student, teacher, batch, **BOTH, hidden=1.0, cosine=1.0)
    assert len(got) == 4 and all(value > 1e-4 for value in got.values())
    sum(got.values()).backward()
    for layer in anatomy(student).layers:
        for path in layer.projections:
            gradient = layer.part(path).weight.grad
            assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    same = asked(student, tiny(family), batch, **BOTH, hidden=1.0, cosine=1.0)
    assert all(abs(value.item()) < 1e-6 for value in same.values())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("fields", [{}, {"attention_kind": "probabilities"}, {"attention_heads": "mean"}])
def test_more_padding_changes_nothing(family, fields):
    student, teacher, batch = tiny(family), tiny(family, seed=1), padded()
    wide = {name: F.pad(value, (0, 4)) for name, value in batch.items()}
    narrow, wider = (asked(student, teacher, one, **BOTH, **fields) for one in (batch, wide))
    assert all(value > 1e-4 for value in narrow.values())
    for name, value in narrow.items():
        torch.testing.assert_close(wider[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_gradient_checkpointing_records_once_and_keeps_the_graph(family):
    batch = batch_for(family)

    def gradients(checkpointing: bool):
        student = tiny(family, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        if checkpointing:
            checkpoint_activations(student)
        objective = Distill(teacher="t", logits=0.0, hidden=1.0, **BOTH)
        context = prepared(objective, student, tiny(family, seed=1))
        calls = []
        student.register_forward_hook(lambda m, a, o: calls.append(dict(o.attended)))
        outputs = student(**batch, output_hidden_states=True)
        kept = dict(outputs.attended)
        got = objective.loss(student, batch, outputs, context)
        sum(got.values()).backward()
        assert len(calls) == 1 and outputs.attended == kept == calls[0] and sorted(kept) == [1, 2]
        assert module._recorder.get() is None
        return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, msg=name)


def test_nothing_is_recorded_where_nothing_asks(monkeypatch):
    taken = []
    monkeypatch.setattr(Recorder, "take", lambda self, module, *args: taken.append(module))
    batch = labelled(4)
    student, teacher = tiny(), tiny(seed=1)
    objective = Distill(teacher="t", hidden=1.0, cosine=1.0)
    context = prepared(objective, student, teacher)
    terms(objective, student, batch, context)
    assert not taken and not student._forward_hooks and not student._forward_pre_hooks
    objective.finalize(student)
    asking = Distill(teacher="t", relations=1.0)
    context = prepared(asking, student, teacher)
    with torch.no_grad():
        student(**batch)
    assert not taken, "evaluation keeps nothing"
    with pytest.raises(KeyError):
        terms(asking, student, batch, context)
    assert len(taken) == 4, "two attention calls each of student and teacher ask the recorder"


def test_an_error_in_the_forward_ends_the_recording():
    student = tiny()
    prepared(Distill(teacher="t", attention=1.0), student, tiny(seed=1))
    with pytest.raises(IndexError):
        student(input_ids=torch.full((1, 3), 10**6))
    assert module._recorder.get() is None
    batch = padded()
    assert "attended" in vars(student(**batch)) and module._recorder.get() is None


def test_finalize_leaves_the_model_as_it_was():
    student, batch = tiny(), labelled(4)
    names, want = list(student.state_dict()), logits(student, batch)
    objective = Distill(teacher="t", hidden=1.0, projection="pair", **BOTH)
    prepared(objective, student, tiny(seed=1))
    objective.finalize(student)
    assert list(student.state_dict()) == names and not hasattr(student, "distillation")
    assert not student._forward_hooks and not student._forward_pre_hooks
    assert "attended" not in vars(student(**batch)) and torch.equal(logits(student, batch), want)


def pruned(seed=1):
    """A teacher whose layers have other numbers of heads than the student's, and other ones than each other."""
    teacher = tiny(seed=seed)
    keep = random_keep(teacher)
    assert [len(kept["heads"]) for kept in keep] == [2, 3]
    shrink(teacher, keep)
    return teacher


def test_other_numbers_of_heads():
    student, teacher, batch = tiny(), pruned(), labelled(4)
    with pytest.raises(
        UserError, match=r"attention: student layer 1 has 4 heads, teacher layer 1 has 2; set attention"
    ):
        asked(student, teacher, batch, attention=1.0)
    for kind in ("scores", "probabilities"):
        assert asked(student, teacher, batch, attention=1.0, attention_heads="mean", attention_kind=kind)
    with pytest.raises(UserError, match=r"relation_heads: 3 does not divide the student's 4 \* 8 attention features"):
        asked(student, teacher, batch, relations=1.0)
    with pytest.raises(UserError, match=r"relation_heads: 16 does not divide the teacher's 3 \* 8 attention features"):
        asked(student, teacher, batch, relations=1.0, relation_heads=16)
    assert asked(student, teacher, batch, relations=1.0, relation_heads=8)["distill.relations"] > 1e-4


def test_relations_of_other_widths_and_grouped_queries():
    batch = padded()
    for changes in ({"head_dim": 8}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"hidden_size": 16}):
        got = asked(tiny("llama"), tiny("llama", seed=1, **changes), batch, relations=1.0, relation_heads=8)
        assert got["distill.relations"] > 1e-4


def test_relation_map():
    student, teacher, batch = tiny(), tiny(seed=1, num_hidden_layers=4), labelled(4)
    one = [asked(student, teacher, batch, relations=1.0, relation_map=(p,)) for p in ((2, 4), (1, 3))]
    assert torch.equal(one[0]["distill.relations"], asked(student, teacher, batch, relations=1.0)["distill.relations"])
    both = asked(student, teacher, batch, relations=1.0, relation_map=((2, 4), (1, 3)))["distill.relations"]
    torch.testing.assert_close(both, (one[0]["distill.relations"] + one[1]["distill.relations"]) / 2)
    for pair in ((3, 1), (1, 5), (0, 1)):
        with pytest.raises(UserError, match=rf"relation_map: pair \[{pair[0]}, {pair[1]}\] is not among layers 1 to 2"):
            asked(student, teacher, batch, relations=1.0, relation_map=(pair,))


@pytest.mark.parametrize("fields", [{"attention": 30.0}, {"relations": 100.0, "relation_heads": 8}])
def test_the_student_approaches_the_teacher(fields):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(8)
    objective = Distill(teacher="t", task=0.0, logits=0.0, **fields)
    context = prepared(objective, student, teacher)
    (before,) = terms(objective, student, batch, context).values()
    fit(student, [objective], [batch], steps=25, context=context, learning_rate=5e-3)
    (after,) = terms(objective, student, batch, context).values()
    assert after < 0.5 * before
