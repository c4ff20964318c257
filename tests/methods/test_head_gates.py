"""Head pruning: gates that start open, importance by gradients, and heads that are really gone at the end."""

import math

import pytest
import torch
from pydantic import ValidationError

from compressft.methods.head_gates import HeadGates, add_importance, most_important
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.shrink import shapes
from compressft.modules.gate import ColumnGate
from compressft.modules.head_gate import HeadGate
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.passes.magnitude import Magnitude
from compressft.passes.movement import Movement
from compressft.passes.n_m import NM
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context, trainable
from tests.methods.added import check_autocast
from tests.methods.universal import check_checkpointing, check_folders, check_resume
from tests.passes.sparse import Run, classifier
from tests.tiny import SHAPE, TINY, batch_for, labelled, logits, tiny

pytestmark = pytest.mark.dear

GATES = HeadGates(penalty=0.3, gate_lr=1.6, end=0.5)
FROZEN = HeadGates(penalty=0.3, gate_lr=1.6, end=0.5, weights="frozen")
HALF = HeadGates(decide="importance", heads=0.5, start=0.0, end=0.5)


def prepared(method, family="bert", **changes):
    model = tiny(family, **changes)
    method.prepare(model, Context())
    return model


def gates(model):
    return [layer.part(layer.family.o).gates["head_gates"] for layer in anatomy(model).layers]


# Gates.


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", [GATES, HALF], ids=["gates", "importance"])
def test_starts_as_the_base(family, method):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(method, family)
    tolerance = 1e-5 if family == "gpt2" else 0
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)
    for gate in gates(model):
        assert len(gate.mask) == SHAPE[family][1]
        gate.mask[0] = 0.0
    assert not torch.allclose(logits(model, batch), want, atol=1e-3)


def test_constants_of_the_gates():
    generator = torch.Generator().manual_seed(0)
    gate = HeadGate(5, 8, generator)
    edge = math.log(11)
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-edge - 1e-3, -edge + 1e-2, 0.0, edge - 1e-2, edge + 1e-3]))
    gate.log_alpha.grad = torch.zeros(5)
    gate.advance()
    assert gate.mask[0] == 0 and 0 < gate.mask[1] < 0.01 and gate.mask[2] == pytest.approx(0.5)
    assert 0.99 < gate.mask[3] < 1 and gate.mask[4] == 1
    # P(open) knows the temperature, the value without noise does not.
    assert float(gate.probability()[2].detach()) == pytest.approx(1 / (1 + math.exp(0.33 * math.log(0.1 / 1.1))))
    assert float(gate.probability()[2].detach()) == pytest.approx(0.688, abs=1e-3)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.5])
def test_probability_to_be_open(alpha):
    number = 40_000
    gate = HeadGate(number, 1, torch.Generator().manual_seed(1)).train()
    with torch.no_grad():
        gate.log_alpha.fill_(alpha)
    gate.sampling = True
    p = float(gate.probability()[0].detach())
    seen = float((gate.columns() != 0).float().mean())
    assert abs(seen - p) < 3 * (p * (1 - p) / number) ** 0.5
    assert torch.equal(gate.columns(), gate.columns()), "one draw a step"
    before = gate.columns().detach()
    gate.log_alpha.grad = torch.zeros(number)
    torch.manual_seed(0)
    gate.advance()
    assert not torch.equal(gate.columns(), before)
    gate.eval()
    assert torch.equal(gate.columns(), gate.mask)


def test_no_step_no_draw():
    gate = HeadGate(4, 8, torch.Generator().manual_seed(0))
    noise = gate.noise.clone()
    gate.advance()
    assert torch.equal(gate.noise, noise) and torch.equal(gate.mask, torch.ones(4))


@pytest.mark.parametrize("method", [GATES, FROZEN, HALF])
def test_trainable_set(method):
    model = prepared(method)
    names = {name for name, _ in trainable(model)}
    learned = {f"bert.encoder.layer.{i}.attention.output.dense.gates.head_gates.log_alpha" for i in (0, 1)}
    head = {n for n in names if n.startswith(("classifier", "bert.pooler"))}
    assert len(head) == 4
    if method is FROZEN:
        assert names == head | learned
    else:
        assert names == {name for name, _ in tiny().named_parameters()} | (learned if method is GATES else set())
    groups = method.param_groups(model, Context())
    if method is HALF:
        assert groups == []
    else:
        (group,) = groups
        assert (group["lr"], group["weight_decay"]) == (1.6, 0.0)
        assert {id(p) for p in group["params"]} == {id(gate.log_alpha) for gate in gates(model)}


def test_frozen_weights_stay():
    run = Run(tiny(), [FROZEN], 6)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in before.items())
    assert any((gate.mask < 1).any() for gate in gates(run.model))


def test_penalty_is_the_mean_over_layers_of_the_sum_over_heads():
    model = prepared(GATES)
    assert GATES.loss(model, {}, None, Context()) == {}, "not before the gates are drawn"
    GATES.after_step(model, 0.1)
    got = GATES.loss(model, {}, None, Context())["head_gates.penalty"]
    p = 1 / (1 + math.exp(-(3.0 - 0.33 * math.log(0.1 / 1.1))))
    assert float(got.detach()) == pytest.approx(0.3 * 4 * p)
    GATES.after_step(model, 0.5)
    assert GATES.loss(model, {}, None, Context()) == {}


def test_gates_rest_after_the_end():
    seen = []
    run = Run(tiny(), [GATES], 10)
    run.train(watch=lambda progress: seen.append(torch.cat([gate.mask.clone() for gate in gates(run.model)])))
    assert not torch.equal(seen[3], seen[4])
    assert all(torch.equal(seen[4], later) for later in seen[5:])
    assert (seen[4] == 0).any(), "the penalty closes some"


# Importance.


def test_importance_is_the_gradient():
    """Against finite differences of the loss in each gate, in double precision."""
    model, batch = classifier("bert")
    HALF.prepare(model, Context())
    model = model.double()
    gate = gates(model)[1]
    gate.mask.requires_grad_()
    model(**batch).loss.backward()
    found = gate.mask.grad.clone()
    gate.mask.requires_grad_(False)
    for head in range(4):
        values = []
        for step in (1e-5, -1e-5):
            gate.mask[head] = 1.0 + step
            with torch.no_grad():
                values.append(float(model(**batch).loss))
        gate.mask[head] = 1.0
        assert float(found[head]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)
    assert (found != 0).all()


def test_a_head_that_nothing_reads_has_none():
    model, batch = classifier("bert")
    HALF.prepare(model, Context())
    linear = anatomy(model).layers[0].part("attention.output.dense")
    with torch.no_grad():
        linear.weight[:, 8:16] = 0.0
    HALF.after_step(model, 0.0)
    model(**batch).loss.backward()
    HALF.after_step(model, 0.01)
    importance = gates(model)[0].importance
    assert importance[1] == 0 and (importance[[0, 2, 3]] > 0).all()


def test_importance_adds_up_over_steps():
    gate = ColumnGate(3, 2)
    gate.mask.grad = torch.tensor([1.0, -2.0, 0.0])
    add_importance(gate)
    add_importance(gate)
    gate.mask.grad = torch.tensor([0.5, 0.5, -0.5])
    add_importance(gate)
    assert torch.equal(gate.importance, torch.tensor([1.5, 2.5, 0.5])) and gate.mask.grad is None


def test_layers_are_normalised_and_never_empty():
    loud, quiet = torch.tensor([30.0, 40.0, 0.0, 0.0]), torch.tensor([0.1, 0.1, 0.1, 0.1])
    kept = most_important([loud, quiet], 6)
    assert [k.tolist() for k in kept] == [[0, 1], [0, 1, 2, 3]]
    loud[2:] = torch.tensor([20.0, 10.0])
    assert [k.tolist() for k in most_important([loud, quiet], 5)] == [[0, 1], [0, 1, 2]]
    assert [k.tolist() for k in most_important([loud, quiet], 3)] == [[0, 1], [0]]
    assert [len(k) for k in most_important([loud, quiet], 0)] == [1, 1]
    assert [k.tolist() for k in most_important([torch.zeros(3), torch.zeros(2)], 3)] == [[0, 1], [0]]


def test_share_rises_to_its_target():
    method = HeadGates(decide="importance", heads=0.5, start=0.2, end=0.6)
    gone = []
    run = Run(tiny(), [method], 10)
    run.train(watch=lambda progress: gone.append(int(sum((gate.mask == 0).sum() for gate in gates(run.model)))))
    assert gone == [0, 0, 1, 2, 3, 4, 4, 4, 4, 4]
    shown = method.status(run.model, 0.4)["heads"]
    assert shown == {"now": 0.5, "planned": pytest.approx(0.25), "target": 0.5}
    assert not any(gate.mask.requires_grad for gate in gates(run.model))


# Real removal.


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("method", [GATES, HALF], ids=["gates", "importance"])
def test_masked_is_pruned(family, method):
    """The model behind its gates and the one without the heads, and the parameters that the formula takes away."""
    model, batch = classifier(family)
    run = Run(model, [method], 10, batch).train()
    masks = [gate.mask.detach().clone() for gate in gates(model)]
    before, total = logits(model, batch), count(model)["total"]
    run.finalize()
    torch.testing.assert_close(logits(model, batch), before, atol=2e-6, rtol=1e-5)
    heads, kv, dim, _ = SHAPE[family]
    kept = [max(int((mask != 0).sum()), 1) for mask in masks]
    assert [shape["kv_heads"] for shape in shapes(model)] == kept and min(kept) < kv
    bias = "attention.self.query.bias" in "".join(n for n, _ in model.named_parameters()) or family in (
        "distilbert",
        "gpt2",
        "qwen2",
    )
    group = heads // kv
    per_group = dim * (32 * (2 * group + 2) + bias * (group + 2))
    learned = 0 if method is HALF else sum(len(mask) for mask in masks)
    assert total - count(model)["total"] == per_group * sum(kv - k for k in kept) + learned
    assert not any("head_gates" in name for name in model.state_dict())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_layer_all_of_whose_gates_are_closed(family):
    model, batch = classifier(family)
    GATES.prepare(model, Context())
    gate = gates(model)[1]
    gate.mask.zero_()
    before = logits(model, batch)
    GATES.finalize(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-6, rtol=1e-5)
    assert shapes(model)[1]["kv_heads"] == 1
    last = anatomy(model).layers[1]
    assert not last.part(last.family.o).weight.any(), "its output is the bias alone"


def test_fractions_are_folded():
    model = prepared(GATES)
    gates(model)[0].mask.copy_(torch.tensor([0.0, 0.25, 1.0, 0.5]))
    weight = anatomy(model).layers[0].part("attention.output.dense").weight.detach().clone()
    GATES.finalize(model)
    got = anatomy(model).layers[0].part("attention.output.dense").weight
    factors = torch.tensor([0.25, 1.0, 0.5]).repeat_interleave(8)
    torch.testing.assert_close(got.detach(), weight[:, 8:] * factors)


@pytest.mark.parametrize("method", [GATES, HALF], ids=["gates", "importance"])
def test_resumed_is_the_same(method):
    check_resume(method, steps=10, stops=(3, 5, 8))


# Next to the rest.


@pytest.mark.parametrize(
    "others",
    [
        [Magnitude(sparsity=0.5, start=0.0, end=0.4)],
        [Movement(sparsity=0.5, start=0.0, end=0.4), Int8()],
        [Structured(ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)],
        [Structured(hidden=0.5, layers=0.5, align_hidden=8, start=0.0, end=0.5)],
    ],
    ids=["magnitude", "movement, int8", "ffn", "hidden, layers"],
)
@pytest.mark.parametrize("method", [GATES, HALF], ids=["gates", "importance"])
def test_beside_passes(method, others):
    assert conflict([method, *others]) is None
    run = Run(tiny(), [method, *others], 10).train()
    before, batch = logits(run.model, labelled()), labelled()
    run.finalize()
    torch.testing.assert_close(logits(run.model, batch), before, atol=1e-5, rtol=1e-4)
    assert min(shape["heads"] for shape in shapes(run.model)) < 4


def test_on_a_base_of_four_bits():
    run = Run(tiny(), [FROZEN, Nf4()], 10).train()
    before = logits(run.model, labelled())
    run.finalize()
    torch.testing.assert_close(logits(run.model, labelled()), before, atol=1e-5, rtol=1e-4)


def test_recomputed_activations_and_autocast():
    for method in (GATES, HALF):
        check_checkpointing(method)
        check_autocast(method, "llama")


def test_refused():
    for wrong in (
        {"decide": "importance"},
        {"heads": 0.5},
        {"decide": "importance", "heads": 1.0},
        {"decide": "importance", "heads": 0.5, "start": 0.6, "end": 0.5},
        {"weights": "some"},
        {"gate_lr": 0},
    ):
        with pytest.raises(ValidationError):
            HeadGates(**wrong)
    assert "set weights to frozen" in conflict([GATES, Nf4()])
    assert conflict([FROZEN, Nf4()]) is None
    assert "both decide which attention heads live" in conflict([GATES, Structured(heads=0.5)])
    assert "groups of input columns whole" in conflict([GATES, NM()])
    assert "use 'nearest'" in conflict([FROZEN, Int4(rounding="gptq")])
    # To freeze the weights would not help: columns go all the same.
    assert "frozen" not in conflict([GATES, Int4(rounding="gptq")])
    assert conflict([FROZEN, Int4()]) is None


def test_delta_of_frozen_weights_names_heads(tmp_path):
    """Rows and columns of the base are stored as their numbers, not as values."""
    method = HeadGates(decide="importance", heads=0.5, start=0.0, end=0.5, weights="frozen")
    stored, _ = check_folders(method, tmp_path, steps=6)
    body = {name: t for name, t in stored.items() if "encoder" in name and "weight" in name}
    assert body and all(name.endswith(("#rows", "#columns")) for name in body)
    assert sum(t.nbytes for t in body.values()) == 4 * 4 * 8 * 4
    check_folders(GATES, tmp_path / "gates", steps=6)
