"""Movement pruning and L0: exact numbers at every step, penalties by their formulas, masks that settle."""

import math

import pytest
import torch

from compressft.methods.full import Full
from compressft.modules.concrete import deterministic
from compressft.modules.gate import ScoreGate
from compressft.modules.l0 import L0Gate
from compressft.passes.l0 import L0
from compressft.passes.magnitude import Magnitude
from compressft.passes.movement import Movement
from compressft.passes.shared.gradual import planned
from compressft.passes.shared.scored import keep_above
from compressft.transform import Context
from tests.passes.sparse import Run, gated, sparsity
from tests.tiny import labelled, tiny

FAST = {"start": 0.0, "end": 0.5}


def test_scores_have_their_own_rate_and_no_decay():
    for one in (Movement(sparsity=0.5), L0()):
        model = tiny()
        run = Run(model, [one], 2)
        (group,) = one.param_groups(model, run.context)
        assert group["weight_decay"] == 0.0 and group["lr"] == (1e-2 if one.type == "movement" else 0.1)
        names = {id(p): n for n, p in model.named_parameters()}
        assert {names[id(p)] for p in group["params"]} == {n for n in names.values() if n.endswith(".scores")}
        assert len(group["params"]) == 12


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant"])
def test_hard_keeps_the_exact_number_at_every_step(schedule):
    model = tiny()
    one = Movement(sparsity=0.83, scope="layer", start=0.2, end=0.6, schedule=schedule)
    seen = []

    def look(progress):
        kept = 1 - 0.83 * planned(one, progress)
        for _, gate in gated(one, model):
            assert int(gate.mask.sum()) == round(kept * gate.scores.numel())
        seen.append(torch.cat([gate.mask.flatten() for _, gate in gated(one, model)]))

    Run(model, [one], 10).train(watch=look)
    assert seen[0].all() and not torch.equal(seen[5], seen[6])
    # Progress .8 is step 8: its masks stay.
    assert all(torch.equal(mask, seen[7]) for mask in seen[7:])


def test_global_keeps_the_exact_number_of_all_layers_together():
    model = tiny()
    one = Movement(sparsity=0.83, **FAST)
    Run(model, [one], 6).train()
    masks = [gate.mask for _, gate in gated(one, model)]
    assert sum(int(m.sum()) for m in masks) == round(0.17 * sum(m.numel() for m in masks))
    assert len({round(float(m.float().mean()), 3) for m in masks}) > 1
    refused = Movement(variant="soft", scope="global").check()
    assert refused is not None and "movement.scope" in refused


def test_where_scores_start():
    def scores(**fields):
        model = tiny()
        one = Movement(**fields, **FAST)
        one.prepare(model, Context((one,)))
        return [gate.scores.detach() for _, gate in gated(one, model)]

    assert torch.cat([s.flatten() for s in scores(sparsity=0.5)]).std().item() == pytest.approx(1)
    for fields in ({"sparsity": 0.5, "initial": "zero"}, {"variant": "soft"}):
        assert not any(s.any() for s in scores(**fields))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_that_do_not_learn_prune_by_magnitude(scope):
    model, other = tiny(), tiny()
    by_score = Movement(sparsity=0.7, scope=scope, learning_rate=1e-12, **FAST)
    by_size = Magnitude(sparsity=0.7, scope=scope, **FAST)
    for one, pruned in ((by_score, model), (by_size, other)):
        one.prepare(pruned, Context((one,)))
        one.after_step(pruned, 1.0 if one is by_size else 0.7)
    for (_, a), (_, b) in zip(gated(by_score, model), gated(by_size, other), strict=True):
        assert torch.equal(a.mask, b.mask)


def test_pruned_weights_return():
    model = tiny()
    one = Movement(sparsity=0.5, schedule="constant", learning_rate=0.1, freeze=1.0, start=0.0, end=0.2)
    seen = []
    Run(model, [one], 10).train(watch=lambda p: seen.append([gate.mask.clone() for _, gate in gated(one, model)]))
    returned = sum(int((~a & b).sum()) for a, b in zip(seen[3], seen[-1], strict=True))
    assert returned > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_scores_learn_also_where_the_weights_are_frozen(frozen):
    model = tiny()
    if frozen:
        model.bert.requires_grad_(False)
    one = Movement(sparsity=0.5, **FAST)
    run = Run(model, [one], 6)
    before = [linear.weight.detach().clone() for linear, _ in gated(one, model)]
    run.train()
    assert all(
        torch.equal(b, linear.weight) == frozen for b, (linear, _) in zip(before, gated(one, model), strict=True)
    )
    assert all(gate.scores.abs().max() > 0 for _, gate in gated(one, model))


def test_soft_penalty_is_the_mean_over_tensors_of_the_mean():
    model = tiny()
    one = Movement(variant="soft", penalty=7.0, threshold=0.2, start=0.0, end=0.5, schedule="linear")
    run = Run(model, [one], 4)
    one.after_step(model, 0.0)
    assert one.loss(model, {}, None, run.context) == {}
    one.after_step(model, 0.25)
    gates = [gate for _, gate in gated(one, model)]
    with torch.no_grad():
        for i, gate in enumerate(gates):
            gate.scores.fill_(0.1 * i)
    mean = sum(1 / (1 + math.exp(-0.1 * i)) for i in range(12)) / 12
    (term,) = one.loss(model, {}, None, run.context).values()
    assert term.item() == pytest.approx(3.5 * mean, rel=1e-5)
    assert all(float(gate.threshold) == pytest.approx(math.log(0.1 / 0.9)) for gate in gates)
    one.after_step(model, 0.9)
    assert one.loss(model, {}, None, run.context) == {}, "masks rest"


def test_a_larger_penalty_leaves_less():
    def density(penalty):
        model = tiny()
        one = Movement(variant="soft", penalty=penalty, learning_rate=0.3, threshold=0.1, **FAST)
        Run(model, [one], 20, labelled(rows=4)).train()
        return 1 - sparsity(model)

    found = [density(penalty) for penalty in (0.0, 20.0, 400.0)]
    assert found[0] > found[1] > found[2] > 0


def test_soft_never_empties_a_tensor():
    gate = ScoreGate(30, 40)
    with torch.no_grad():
        gate.scores.copy_(torch.randn(30, 40, generator=torch.Generator().manual_seed(0)) - 50.0)
    keep_above(gate, 0.1)
    assert int(gate.mask.sum()) == int(0.005 * 1200) + 1
    keep_above(gate, 0.0)
    assert gate.mask.all()
    with torch.no_grad():
        gate.scores.fill_(-50.0)
    keep_above(gate, 0.1)
    assert int(gate.mask.sum()) == 7


def test_l0_penalty_is_the_expected_share_of_open_gates():
    model = tiny()
    one = L0(penalty=4.0, start=0.0, end=0.5, schedule="linear")
    run = Run(model, [one], 4)
    one.after_step(model, 0.25)
    (term,) = one.loss(model, {}, None, run.context).values()
    assert term.item() == pytest.approx(2.0 * 0.978, rel=1e-3)
    term.backward()
    assert all((gate.scores.grad > 0).all() for _, gate in gated(one, model))


def test_l0_gates_are_noisy_until_they_freeze_and_ship_their_mean_form():
    model = tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    one, batch = L0(penalty=30.0, learning_rate=2.0, end=0.5, freeze=0.75), labelled()
    run = Run(model, [Full(), one], 8, batch)
    noisy = {}

    def look(progress):
        model.train()
        with torch.no_grad():
            noisy[progress] = not torch.equal(model(**batch).logits, model(**batch).logits)

    run.train(watch=look)
    assert noisy == {step / 8: step < 6 for step in range(1, 9)}
    gates = [gate for _, gate in gated(one, model)]
    values = torch.cat([deterministic(gate.scores.detach()).flatten() for gate in gates])
    assert ((values > 0) & (values < 1)).any() and (values == 0).any()
    want = [(linear.weight * deterministic(gate.scores)).detach() for linear, gate in gated(one, model)]
    layers = [linear for linear, _ in gated(one, model)]
    model.train()
    run.finalize()
    assert not any(isinstance(m, L0Gate) for m in model.modules())
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, want, strict=True))


def test_l0_settles_without_noise_wherever_training_ends():
    model = tiny().train()
    one = L0(initial=0.5)
    Run(model, [one], 2)
    want = [(linear.weight * deterministic(gate.scores)).detach() for linear, gate in gated(one, model)]
    layers = [linear for linear, _ in gated(one, model)]
    one.finalize(model)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(layers, want, strict=True))
