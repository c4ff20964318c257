"""Diff pruning: the base at first, gates with their constants, an exact cut, then the survivors alone."""

import pytest
import torch
from pydantic import ValidationError

from compressft.methods.diff import Diff
from compressft.modules.diff import WeightDiff
from compressft.modules.linear import CompressedLinear, bare, dense
from compressft.passes.magnitude import Magnitude
from compressft.passes.nf4 import Nf4
from compressft.transform import Context, trainable
from tests.methods.added import check_autocast
from tests.methods.universal import check_checkpointing, check_folders, check_resume
from tests.passes.sparse import Run, classifier, linears
from tests.tiny import TINY, batch_for, labelled, logits, tiny

METHOD = Diff(density=0.02, gate_lr=0.5)


def prepared(method=METHOD, family="bert", **changes):
    model = tiny(family, **changes)
    method.prepare(model, Context())
    return model


def diffs(model) -> list[WeightDiff]:
    return [m.delta for m in model.modules() if isinstance(m, CompressedLinear) and m.delta is not None]


def total(model) -> int:
    return sum(diff.values.numel() for diff in diffs(model))


def half_open(model) -> None:
    """Gates between 0 and 1, so that what they do to the values shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for diff in diffs(model):
            diff.log_alpha.copy_(torch.randn(diff.log_alpha.shape, generator=generator))
            diff.group.fill_(0.5)


# The start.


@pytest.mark.parametrize("family", TINY)
def test_starts_as_the_base(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(family=family)
    tolerance = 1e-5 if family == "gpt2" else 0
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)
    assert len(diffs(model)) == len(linears(model))
    for diff in diffs(model):
        torch.nn.init.normal_(diff.values, std=0.1)
    assert not torch.allclose(logits(model, batch), want, atol=1e-2)
    with bare():
        torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)
    with dense():
        assert not torch.allclose(logits(model, batch), want, atol=1e-2), "the delta is no gate"


HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("structured", [True, False])
def test_trainable_set_and_groups(structured):
    method = Diff(structured=structured, learning_rate=2e-4)
    model = prepared(method)
    parts = ("values", "log_alpha", "group") if structured else ("values", "log_alpha")
    names = {name for name, _ in trainable(model)}
    assert names == HEAD | {f"{path}.delta.{part}" for path, _ in linears(model) for part in parts}
    values, gates = method.param_groups(model, Context())
    assert (values["lr"], gates["lr"], values["weight_decay"], gates["weight_decay"]) == (2e-4, 0.1, 0.0, 0.0)
    own = {id(p) for group in (values, gates) for p in group["params"]}
    assert own == {id(p) for name, p in trainable(model) if name not in HEAD}
    assert "lr" not in Diff().param_groups(model, Context())[0]


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_the_base_never_moves(family):
    model, batch = classifier(family)
    run = Run(model, [METHOD], 6, batch)
    names = {name for name, _ in trainable(model)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved - names == {n for n in before if n.endswith(("delta.bits", "delta.cuts"))}
    assert all(n in moved for n in names if n.endswith("delta.values"))


# The gates.


@pytest.mark.parametrize("structured", [True, False])
def test_the_penaltys_slope(structured):
    """What closes a gate, in every gate of every matrix, is that of finite differences in fp64; w feels nothing."""
    method = Diff(structured=structured, penalty=0.5)
    model = prepared(method).double()
    gates = method.param_groups(model, Context())[1]["params"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates:
            gate.copy_(torch.randn(gate.shape, generator=generator, dtype=torch.float64))

    def penalty():
        return method.loss(model, {}, None, Context())["diff.penalty"]

    penalty().backward()
    assert len(gates) == (2 if structured else 1) * len(linears(model))
    for gate in gates:
        direction = torch.randn(gate.shape, generator=generator, dtype=torch.float64)
        ends = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):
                gate.add_(direction, alpha=step)
                ends.append(float(penalty()))
        assert float((gate.grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
    assert all(diff.values.grad is None for diff in diffs(model))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.7])
def test_probability_to_be_open(alpha):
    diff = WeightDiff(200, 300, grouped=False)
    with torch.no_grad():
        diff.values.fill_(1.0)
        diff.log_alpha.fill_(alpha)
    torch.manual_seed(0)
    number = diff.values.numel()
    p = torch.sigmoid(torch.tensor(alpha)).item()
    drawn = diff.train()()
    seen = int((drawn != 0).sum()) / number
    assert abs(seen - p) < 3 * (p * (1 - p) / number) ** 0.5
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert float(diff.penalty().detach()) == pytest.approx(number * p, rel=1e-5)
    assert not torch.equal(diff(), drawn), "noise is drawn anew"


def test_without_noise_the_gate_is_closed_up_to_an_alpha_of_0():
    diff = WeightDiff(1, 5, grouped=False).eval()
    with torch.no_grad():
        diff.values.fill_(2.0)
        diff.log_alpha.copy_(torch.tensor([[-3.0, 0.0, 0.1, 1.0, 5.0]]))
    z = diff().detach() / 2
    assert torch.equal(z[0] > 0, torch.tensor([False, False, True, True, True]))
    want = (torch.sigmoid(diff.log_alpha) * 3 - 1.5).clamp(0, 1).detach()
    torch.testing.assert_close(z, want)
    assert z[0, 4] == 1


def test_the_group_closes_a_whole_matrix_and_counts_once():
    diff = WeightDiff(4, 5, grouped=True).eval()
    with torch.no_grad():
        diff.values.fill_(1.0)
        diff.group.fill_(0.25)
    expected = torch.sigmoid(torch.tensor(0.25)) * 3 - 1.5
    torch.testing.assert_close(diff(), expected.expand(4, 5))
    sigma = torch.sigmoid
    assert float(diff.penalty().detach()) == pytest.approx(
        20 * float(sigma(torch.tensor(5.0))) + float(sigma(torch.tensor(0.25)))
    )
    with torch.no_grad():
        diff.group.fill_(-0.1)
    assert not diff().any() and not diff.settled().any()


def test_penalty_is_lambda_times_the_sum():
    method = Diff(penalty=1e-3)
    model = prepared(method)
    got = method.loss(model, {}, None, Context())["diff.penalty"]
    entries = total(model) + len(diffs(model))
    assert float(got.detach()) == pytest.approx(1e-3 * entries * float(torch.sigmoid(torch.tensor(5.0))), rel=1e-5)
    assert Diff(penalty=0).loss(model, {}, None, Context()) == {}


def test_gates_close_without_a_use():
    """With a penalty and no task for them, gates go towards closed."""
    run = Run(tiny(), [Diff(penalty=1.0, gate_lr=0.5, end=0.9)], 30).train(25)
    assert max(float(diff.log_alpha.detach().median()) for diff in diffs(run.model)) < 0


# The cut.


def test_the_cut_keeps_exactly_the_largest():
    run = Run(tiny(), [METHOD], 10).train(5)
    assert not diffs(run.model)[0].fixed
    half_open(run.model)
    before = [diff.settled() for diff in diffs(run.model)]
    number = round(0.02 * total(run.model))
    METHOD.after_step(run.model, METHOD.end)
    after = [diff().detach() for diff in diffs(run.model)]
    sizes, kept = torch.cat([b.abs().flatten() for b in before]), torch.cat([a.flatten() != 0 for a in after])
    assert int(kept.sum()) == number
    assert sizes[kept].min() >= sizes[~kept].max()
    for b, a in zip(before, after, strict=True):
        assert torch.equal(a[a != 0], b[a != 0])
    assert METHOD.loss(run.model, {}, None, Context()) == {}
    assert METHOD.status(run.model, 0.7)["density"] == {"now": 0.02, "planned": 0.02, "target": 0.02}


def test_equal_entries_are_cut_to_the_same_number_everywhere():
    method = Diff(density=0.5)
    model = prepared(method)
    for diff in diffs(model):
        torch.nn.init.ones_(diff.values)
    method.after_step(model, 1.0)
    assert sum(int((diff() != 0).sum()) for diff in diffs(model)) == round(0.5 * total(model))


def test_after_the_cut_only_the_survivors_learn():
    run = Run(tiny(), [METHOD], 10)
    seen = []

    def watch(progress):
        if progress >= METHOD.end:
            seen.append(
                ([diff().detach() for diff in diffs(run.model)], [d.log_alpha.clone() for d in diffs(run.model)])
            )

    run.train(watch=watch)
    assert len(seen) == 5
    supports = [torch.cat([(d != 0).flatten() for d in one[0]]) for one in seen]
    assert all(int(support.sum()) == round(0.02 * total(run.model)) for support in supports)
    assert all(torch.equal(supports[0], other) for other in supports)
    assert not torch.equal(torch.cat([d.flatten() for d in seen[0][0]]), torch.cat([d.flatten() for d in seen[-1][0]]))
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[-1][1], strict=True)), "gates are done"


def test_a_second_call_cuts_nothing():
    run = Run(tiny(), [METHOD], 10).train(5)
    half_open(run.model)
    METHOD.after_step(run.model, 0.7)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    METHOD.after_step(run.model, 0.8)
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())


def test_resumed_is_the_same():
    check_resume(METHOD, steps=10, stops=(3, 8))


def test_refused():
    for wrong in ({"density": 0}, {"density": 1}, {"end": 1.0}, {"end": 0.0}, {"gate_lr": 0}, {"penalty": -1}):
        with pytest.raises(ValidationError):
            Diff(**wrong)


# Next to the rest.


def test_recomputed_activations_and_autocast():
    check_checkpointing(METHOD)
    check_autocast(METHOD, "llama")


@pytest.mark.parametrize("others", [[Nf4()], [Magnitude(sparsity=0.5, start=0.0, end=0.4)]], ids=["nf4", "magnitude"])
def test_beside_passes(others):
    run = Run(tiny(), [METHOD, *others], 6).train()
    batch = labelled()
    changed = [m.weight + m.delta() for _, m in linears(run.model)]
    gates = [m.gates["magnitude"].mask if "magnitude" in m.gates else 1 for _, m in linears(run.model)]
    before = logits(run.model, batch)
    run.finalize()
    torch.testing.assert_close(logits(run.model, batch), before, atol=1e-5, rtol=1e-5)
    for (_, module), weight, gate in zip(linears(run.model), changed, gates, strict=True):
        assert module.delta is None and torch.equal(module.weight, weight.detach() * gate)


def test_settled_without_a_last_step():
    """What finalize is given before the schedule got there is cut all the same."""
    model = prepared(Diff(density=0.1))
    base = [m.weight.clone() for _, m in linears(model)]
    for diff in diffs(model):
        torch.nn.init.ones_(diff.values)
    number = round(0.1 * total(model))
    Diff(density=0.1).finalize(model)
    changed = sum(int((m.weight != b).sum()) for (_, m), b in zip(linears(model), base, strict=True))
    assert changed == number


# Folders.


def test_delta_is_places_and_values(tmp_path):
    """At a density of 2 % an entry is its four bytes and little more than one that says where it is."""
    stored, base = check_folders(METHOD, tmp_path, steps=6)
    body = {name: tensor for name, tensor in stored.items() if "encoder" in name}
    values = [t for name, t in body.items() if name.endswith("#changed")]
    entries = sum(len(v) for v in values)
    weights = sum(
        t.numel() for name, t in base.items() if name.endswith("weight") and t.dim() == 2 and "encoder" in name
    )
    assert 0.9 * round(0.02 * weights) <= entries <= round(0.02 * weights)
    assert {name.partition("#")[2] for name in body} <= {"changed", "changed_gaps", "changed_bits"}
    assert sum(t.nbytes for t in body.values()) < 5.3 * entries
