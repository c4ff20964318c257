"""Closeness in parameter space: the figures of planted changes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from compressft.errors import UserError
from compressft.evaluation.analyses.analysis import Subjects
from compressft.evaluation.analyses.closeness import COLUMNS, Closeness, acting, angle, bits_kept, compared, rank
from compressft.model.surgery import compress_linear
from compressft.modules.gate import MaskGate
from tests.tiny import tiny

PAIR = Closeness(models=("a", "b"))


def between(a, b):
    return PAIR.find(Subjects(("a", "b"), {"a": a, "b": b}.__getitem__))


def column(finding, name):
    return {row[0]: row[COLUMNS.index(name)] for row in finding.rows}


def test_a_model_is_no_distance_from_itself():
    found = between(tiny(), tiny())
    assert found.summary["changed"] == 0 and found.summary["relative"] == 0.0
    for name in ("L2", "mean |change|", "relative", "angle / pi", "signs flipped"):
        assert set(column(found, name).values()) == {0.0}, name
    assert set(column(found, "bf16 bits kept").values()) == {1.0}


def test_the_opposite_is_half_a_turn_away():
    a = torch.randn(30, generator=torch.Generator().manual_seed(0))
    assert angle(a.double(), -a.double()) == 1.0
    assert angle(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()) == pytest.approx(0.5)
    # arccos of the cosine would say 0 here.
    assert angle(torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1e-9]).double()) == pytest.approx(1e-9 / math.pi)
    assert compared(a, -a)[4] == 1.0, "every sign flipped"
    assert angle(a.double(), torch.zeros(30).double()) is None


def test_a_planted_change_of_low_rank_is_found():
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(40, 2, generator=generator), torch.randn(2, 30, generator=generator)
    assert rank((u[:, :1] @ v[:1]).double()) == 1
    assert rank((u @ v).double()) == 2
    assert rank(torch.zeros(5, 7).double()) == 0
    assert rank(torch.eye(10).double()) == 9, "nine of ten equal directions hold 90 %"
    assert rank(torch.zeros(5).double()) is None


def test_bits_are_those_of_bf16():
    a = torch.tensor([1.0, 1.0])
    # One step of bf16 is one bit of the mantissa; what rounds away is no bit at all.
    assert bits_kept(a, torch.tensor([1.0, 1.0 + 2**-7])) == 1 - 1 / 32
    assert bits_kept(a, torch.tensor([1.0, 1.0 + 2**-12])) == 1.0
    assert bits_kept(a, torch.tensor([1.0, -1.0])) == 1 - 1 / 32


def test_only_what_was_trained_has_moved():
    a, b = tiny(), tiny()
    with torch.no_grad():
        b.bert.encoder.layer[1].output.dense.weight.add_(0.5)
    found = between(a, b)
    moved = {name: value for name, value in column(found, "mean |change|").items() if value}
    assert moved == {"bert.encoder.layer.1.output.dense.weight": pytest.approx(0.5, rel=1e-6)}
    assert column(found, "rank")["bert.encoder.layer.1.output.dense.weight"] == 1
    weight = a.bert.encoder.layer[1].output.dense.weight
    assert found.summary["l2"] == pytest.approx(0.5 * math.sqrt(weight.numel()), rel=1e-5)


def test_weights_count_as_they_act():
    a, b = tiny(), tiny()
    linear = compress_linear(b, "bert.encoder.layer.0.output.dense")
    gate = MaskGate(*linear.weight.shape)
    gate.keep(torch.zeros(linear.weight.shape, dtype=torch.bool))
    linear.gates["mask"] = gate
    assert not acting(b)["bert.encoder.layer.0.output.dense.weight"].any()
    assert column(between(a, b), "relative")["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(1.0)


def test_other_shapes_are_left_out_and_said():
    found = between(tiny(num_labels=2), tiny(num_labels=3))
    assert "classifier.weight" not in column(found, "L2")
    assert found.notes == ("2 tensors have other shapes, such as classifier.weight, and are left out",)


def test_models_of_nothing_in_common_are_refused():
    with pytest.raises(UserError, match="have no tensor of one name and shape"):
        between(tiny("bert"), tiny("llama"))


def test_the_models_are_left_as_they_were():
    a, b = tiny(), tiny(seed=2)
    before = copy.deepcopy(b.state_dict())
    between(a, b)
    assert all(torch.equal(value, before[name]) for name, value in b.state_dict().items())


def test_two_models_are_wanted():
    assert Closeness(models=("a",)).refuse() == "analysis 'closeness' compares 2 models; got 1: a"
    assert PAIR.refuse() is None


def test_a_head_that_the_base_lacks_is_no_distance():
    """What was drawn at random when training began is not compared with what it became."""
    trained, base = tiny(seed=1), {name: value for name, value in acting(tiny()).items() if "classifier" not in name}
    pair = Closeness(models=("base", "trained"))
    found = pair.find(Subjects(("base", "trained"), lambda name: trained, lambda: base))
    assert not any("classifier" in name for name in column(found, "L2"))
    assert len(found.rows) == len(base)
    assert any("classifier" in note for note in found.notes)
