"""Every kind of teacher: the base below what a method added, and which combinations are refused."""

import copy

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.layers import Layers
from compressft.methods.probe import Probe
from compressft.methods.task_vector import CodedTaskVector
from compressft.modules.linear import bare, dense, is_bare, is_dense
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.teacher import base_modules, base_tensors
from compressft.passes.depth import Depth
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.passes.ziplm import ZipLM
from compressft.recipe.conflict import conflict
from compressft.recipe.recipe import parse_recipe
from compressft.transform import Context
from tests.objectives.pair import prepared, terms
from tests.tiny import TINY, batch_for, fit, labelled, logits, padded, tiny

PFEIFFER = Adapter(placement="pfeiffer", size=4)
INSIDE = {"hidden": 1.0, "attention": 1.0, "relations": 1.0, "cosine": 1.0}
ZIPLM = ZipLM(target={"sparsity": 0.4}, layers=True)
BASE = Distill(teacher="base", logits=0.0, **INSIDE)


class Shift(torch.nn.Module):
    """A delta."""

    def __init__(self, shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full(shape, 0.3))

    def forward(self):
        return self.weight


def disturb(model):
    """Other values for everything that a method added."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", TINY)
def test_bare_is_the_base(family, placement):
    """Adapters in every place, gates and quantisers: off together, and on again afterwards."""
    model, batch = tiny(family), batch_for(family)
    want = logits(model, batch)
    for transform in (Adapter(placement=placement, size=4), Structured(heads=0.5, ffn=0.5), Int8()):
        transform.prepare(model, Context())
    disturb(model)
    with torch.no_grad():
        model.train()(**batch)
    model.eval()
    there = logits(model, batch)
    assert (there - want).abs().max() > 1e-2
    with bare():
        assert is_bare() and is_dense()
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
        with dense():
            torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
        assert is_bare()
    assert not is_bare() and not is_dense() and torch.equal(logits(model, batch), there)
    with dense():
        assert not is_bare() and (logits(model, batch) - want).abs().max() > 1e-2


def test_bare_leaves_deltas_out():
    from compressft.model.surgery import compress_linear

    model, batch = tiny(), padded()
    want = logits(model, batch)
    linear = compress_linear(model, "bert.encoder.layer.0.output.dense")
    linear.delta = Shift(linear.weight.shape)
    assert not torch.equal(logits(model, batch), want)
    with bare():
        assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("training", [True, False])
def test_base_is_the_frozen_model_without_a_second_one(training):
    student, twin, batch = tiny(), tiny(), labelled(4)
    PFEIFFER.prepare(student, Context())
    Structured(heads=0.5, ffn=0.5).prepare(student, Context())
    disturb(student)
    context = prepared(BASE, student)
    assert context.teachers == {}
    student.train(training)
    torch.manual_seed(0)
    outputs = student(**batch, output_hidden_states=True)
    before = copy.deepcopy(student.state_dict())
    got = BASE.loss(student, batch, outputs, context)
    assert all(m.training == training for m in student.modules())
    assert all(torch.equal(before[n], v) for n, v in student.state_dict().items())
    other = Distill(teacher="t", logits=0.0, **INSIDE)
    BASE.finalize(student)
    want = other.loss(student, batch, outputs, prepared(other, student, twin))
    assert len(got) == 4 and all(value > 1e-4 for value in got.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def test_base_modules_are_those_of_the_plain_model():
    student, plain = tiny(), dict(tiny().named_parameters())
    for transform in (PFEIFFER, Structured(heads=0.5, ffn=0.5), Int8(), BASE):
        transform.prepare(student, Context())
    held = {n: p for path, m in base_modules(student) for n, p in m.named_parameters(path, recurse=False)}
    assert {n.replace(".inner.", ".") for n in held} == plain.keys()


def test_base_wants_its_weights_frozen():
    for method, name in (
        (Full(), "bert.embeddings.word_embeddings.weight"),
        (Layers(top=1), "bert.encoder.layer.1.attention.self.query.weight"),
        (Adapter(placement="houlsby", size=4), "LayerNorm"),
    ):
        student = tiny()
        method.prepare(student, Context())
        with pytest.raises(UserError, match=rf"'base' wants the base's weights frozen, the method trains .*{name}"):
            prepared(BASE, student)
    for method in (PFEIFFER, Layers(top=0)):
        student = tiny()
        method.prepare(student, Context())
        prepared(BASE, student)


def test_logits_of_the_base_need_a_pretrained_head():
    student = tiny()
    PFEIFFER.prepare(student, Context())
    with pytest.raises(UserError, match=r"logits: the teacher 'base' has no trained head of its own"):
        prepared(Distill(teacher="base"), student)
    objective = Distill(teacher="base", logits=1.0)
    # Tied to the embeddings, and not.
    for family in ("gpt2", "llama"):
        model = tiny(family)
        PFEIFFER.prepare(model, Context())
        disturb(model)
        got = terms(objective, model, padded(), prepared(objective, model))
        assert got["distill.logits"] > 1e-3
    model.lm_head.requires_grad_(True)
    with pytest.raises(UserError, match=r"the method trains lm_head\.weight"):
        prepared(objective, model)


def test_training_beside_the_base_leaves_it_as_it_was():
    student, batch = tiny(), labelled(8)
    PFEIFFER.prepare(student, Context())
    before = {name: tensor.clone() for name, tensor in base_tensors(student).items()}
    context = prepared(BASE, student)
    fit(student, [BASE], [batch], steps=5, context=context)
    after = base_tensors(student)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    disturb(student)
    assert all(torch.equal(before[n], v) for n, v in base_tensors(student).items())


@pytest.mark.parametrize("teacher", ["t", "self", "base"])
def test_no_graph_reaches_the_teacher(teacher):
    student, other, batch = tiny(), tiny(seed=1), labelled(4)
    PFEIFFER.prepare(student, Context())
    disturb(student)
    objective = Distill(teacher=teacher, logits=0.0, **INSIDE)
    context = prepared(objective, student, other)
    from compressft.objectives.distillation.teacher import ask, attention_modules

    source = other if teacher == "t" else student
    answer = ask(source, teacher, padded(), {0, 2}, attention_modules(source, {1}))
    tensors = [answer.logits, *answer.hidden.values(), answer.attended[1].query, answer.attended[1].value]
    assert not any(tensor.requires_grad for tensor in tensors)
    sum(terms(objective, student, batch, context).values()).backward()
    assert all(p.grad is None for p in other.parameters())


def test_other_numbers_of_classes_are_refused():
    student, teacher = tiny(), tiny(seed=1, num_labels=5)
    objective = Distill(teacher="t")
    context = prepared(objective, student, teacher)
    with pytest.raises(UserError, match=r"logits: the student has 3 classes, teacher 't' has 5"):
        terms(objective, student, labelled(4), context)


@pytest.mark.parametrize(
    ("fields", "others", "said"),
    [
        ({"hidden": 1.0}, [Probe()], "distill.hidden: compares what is inside the models, and method 'probe' keeps no"),
        ({"cosine": 1.0}, [Probe()], "and method 'probe' keeps no hidden states; set cosine to 0"),
        ({"relations": 1.0}, [Probe()], "and method 'probe' keeps no hidden states; set relations to 0"),
        (
            {"teacher": "base"},
            [Full()],
            "distill.teacher: 'base' is the model as it was loaded, and method 'full' trains",
        ),
        (
            {"teacher": "base"},
            [CodedTaskVector()],
            "and method 'task_vector' trains the weights; take an earlier stage",
        ),
        (
            {"teacher": "base"},
            [Depth(keep=1)],
            "and pass 'depth' removes layers before training; take an",
        ),
        (
            {"teacher": "base"},
            [ZIPLM],
            "and pass ziplm.layers removes layers before training; leave layers out",
        ),
        ({"layer_map": "learned"}, [], "distill.layer_map: 'learned' goes by the distances of hidden states"),
        ({"layer_map": "origin"}, [], "add pass 'ziplm' or pass 'depth', or use uniform or pairs"),
        ({"layer_map": []}, [], "distill.layer_map: has no pairs"),
        ({"layer_map": [[0, 0]], "attention": 1.0}, [], "distill.layer_map: pairs no layers"),
        ({"relation_heads": 4}, [], "distill.relation_heads: relations is 0"),
        ({"relation_map": [[1, 1]]}, [], "distill.relation_map: relations is 0"),
        ({"attention_kind": "probabilities"}, [], "distill.attention_kind: attention is 0"),
        ({"attention_heads": "mean"}, [], "distill.attention_heads: attention is 0"),
        ({"projection": "shared"}, [], "distill.projection: hidden and cosine are 0"),
        ({"intermediate_until": 0.5}, [], "distill.intermediate_until: no term for the first phase"),
        (
            {"intermediate_until": 0.5, "hidden": 1.0, "task": 0.0, "logits": 0.0},
            [],
            "distill.intermediate_until: no term for the second phase",
        ),
        ({"cache": True, "teacher": "self"}, [], "distill.cache: the teacher 'self' changes with every step"),
        ({"cache": True, "attention": 1.0}, [], "distill.cache: keeps logits and hidden states only"),
        ({"cache": True, "relations": 1.0}, [], "distill.cache: keeps logits and hidden states only"),
        ({"cache": True, "logits": 0.0}, [], "distill.cache: nothing is asked of the teacher"),
    ],
)
def test_refused(fields, others, said):
    objective = Distill(**{"teacher": "t", **fields})
    reason = objective.check() or conflict([*others, objective])
    assert reason is not None and said in reason and "\n" not in reason


def test_a_stage_cannot_be_named_as_the_students_own_teachers():
    for name in ("self", "base"):
        document = {"name": "x", "model": "minilm", "data": {"sample": "banking77"}, "stages": [{"name": name}]}
        with pytest.raises(UserError, match=rf"the name '{name}' is taken by the distillation teacher"):
            parse_recipe(document)


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({}, [Probe()]),
        ({"teacher": "base", "hidden": 1.0, "logits": 0.0, "cache": True}, [PFEIFFER]),
        ({"hidden": 1.0, "layer_map": "learned", "intermediate_until": 0.5}, [Full(), Int8()]),
        ({"hidden": 1.0, "layer_map": "origin"}, [Depth(keep=1)]),
        ({"cache": True, "hidden": 1.0}, [Full()]),
    ],
)
def test_not_refused(fields, others):
    objective = Distill(**{"teacher": "t", **fields})
    assert objective.check() is None and conflict([*others, objective]) is None
