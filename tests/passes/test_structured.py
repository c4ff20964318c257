"""Structured pruning: schedule, exact counts, floors, who may return until when, and a model that is really smaller."""

from itertools import pairwise

import pytest
import torch

from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.shrink import shapes
from compressft.modules.gate import ColumnGate
from compressft.passes.structured import Structured, keep_equally, keep_globally
from compressft.transform import SHAPES, Context
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny


def gates(model, path):
    return [layer.part(getattr(layer.family, path)).gates["structured"] for layer in anatomy(model).layers]


@pytest.mark.parametrize("schedule", SHAPES)
def test_schedule_ends_and_is_monotone(schedule):
    one = Structured(ffn=0.6, start=0.1, end=0.7, schedule=schedule)
    values = [one.planned(0.6, step / 200) for step in range(201)]
    assert values[0] == values[20] == 0.0 and all(v == pytest.approx(0.6) for v in values[140:])
    assert all(a <= b for a, b in pairwise(values))
    assert one.planned(0.6, 0.33) == one.planned(0.6, 0.33)


def scores(*sizes, ties=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.full((size,), 0.25) if ties else torch.rand(size, generator=generator) for size in sizes]


TIES = [False, True]


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("kept", [1.0, 0.9, 0.5, 0.37, 0.05])
@pytest.mark.parametrize(("size", "align", "floor"), [(64, 8, 8), (64, 1, 1), (12, 1, 1), (64, 32, 32), (64, 8, 5)])
def test_global_counts_are_exact(size, align, floor, kept, ties):
    groups = keep_globally(scores(size, size, size, ties=ties), kept, align, floor)
    numbers = [len(g) for g in groups]
    least = -(-floor // align) * align
    assert sum(numbers) == max(round(kept * 3 * size / align) * align, 3 * least)
    assert all(n % align == 0 and least <= n <= size for n in numbers)
    for g in groups:
        assert torch.equal(g, g.unique()), "ascending, no index twice"


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("size", [50, 20, 33])
@pytest.mark.parametrize("kept", [1.0, 0.99, 0.8, 0.5, 0.1, 0.0])
def test_sizes_that_are_no_multiple_of_align(size, kept, ties):
    align = floor = 32
    for number in [len(g) for g in keep_globally(scores(size, size, size, size, ties=ties), kept, align, floor)]:
        assert number == size or (number % align == 0 and number >= min(floor, size))
    total = sum(len(g) for g in keep_globally(scores(size, size, size, size, ties=ties), kept, align, floor))
    assert total >= min(floor, size) * 4
    if kept == 1.0:
        assert total == 4 * size, "nothing is asked to go"
    assert total - max(kept * 4 * size, 4 * min(floor, size)) <= align / 2


@pytest.mark.parametrize("select", [keep_globally, keep_equally])
@pytest.mark.parametrize("size", [64, 50])
def test_kept_numbers_fall_with_the_budget(select, size):
    values = scores(size, size, size)
    totals = [sum(len(g) for g in select(values, 1 - step / 100, 8, 8)) for step in range(101)]
    assert totals[0] == 3 * size and totals[-1] == 3 * 8
    assert all(a >= b for a, b in pairwise(totals))


def test_global_keeps_the_best_within_a_layer_and_spends_where_the_scores_are():
    flat, peaked = torch.ones(16), torch.zeros(16)
    peaked[[3, 9, 10, 14]] = 1.0
    first, second = keep_globally([flat, peaked], 0.625, 4, 4)
    # 20 of 32: the peaked layer needs four neurons, the flat one all of its own.
    assert second.tolist() == [3, 9, 10, 14] and len(first) == 16
    scaled = keep_globally([1e6 * flat, 1e-6 * peaked], 0.625, 4, 4)
    assert torch.equal(scaled[0], first) and torch.equal(scaled[1], second), "layers are normalised"


def test_equal_counts_and_the_highest_scores():
    values = scores(40, 40)
    for g, score in zip(keep_equally(values, 0.5, 8, 8), values, strict=True):
        assert len(g) in (16, 24) and set(g.tolist()) == set(score.topk(len(g)).indices.tolist())
    assert [len(g) for g in keep_equally(scores(40, 40, ties=True), 0.3, 8, 16)] == [16, 16]


def run(model, one, batch, steps=10, **settings):
    one.prepare(model, Context())
    fit(model, [one], [batch], steps, **settings)


@pytest.mark.parametrize("uniform", [False, True])
def test_training_reaches_its_target_and_finalize_ships_the_masked_model(uniform):
    model, batch = tiny(), labelled()
    one = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.1, end=0.6, uniform=uniform)
    run(model, one, batch)
    want, before = logits(model, batch), count(model)["total"]
    assert all(v["now"] == v["planned"] == v["target"] == 0.5 for v in one.status(model, 1.0).values())
    one.finalize(model)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    present = shapes(model)
    assert sum(x["heads"] for x in present) == 4 and sum(x["ffn"] for x in present) == 64
    assert all(x["ffn"] % 8 == 0 and x["ffn"] >= 8 and x["heads"] >= 1 for x in present)
    if uniform:
        assert present == [{"heads": 2, "kv_heads": 2, "ffn": 32}] * 2
    # Per head 3 * 8 * (32 + 1) + 8 * 32, per neuron 32 + 1 + 32.
    assert count(model)["total"] == before - 4 * (3 * 8 * 33 + 8 * 32) - 64 * 65
    assert not any(isinstance(m, ColumnGate) for m in model.modules())
    assert not any("gate" in name for name in model.state_dict())


@pytest.mark.parametrize("family", TINY)
def test_every_family_ships_its_masked_model(family):
    classifier = (
        TINY[family][0]
        .replace("CausalLM", "SequenceClassification")
        .replace("LMHeadModel", "ForSequenceClassification")
    )
    model, batch = tiny(family, architecture=classifier), {**batch_for(family), "labels": torch.tensor([0, 1, 2, 0])}
    one = Structured(heads=0.5, ffn=0.4, align=4, floor_ffn=4, start=0.0, end=0.5)
    run(model, one, batch, steps=4)
    want, dense = logits(model, batch), logits(tiny(family, architecture=classifier), batch)
    one.finalize(model)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(want, dense, atol=1e-2)
    groups = 2 if TINY[family][1].get("num_key_value_heads") else 1
    assert all(x["heads"] == groups * x["kv_heads"] for x in shapes(model))
    assert sum(x["kv_heads"] for x in shapes(model)) == 4 // groups


def test_masks_follow_progress():
    model = tiny()
    one = Structured(ffn=0.5, align=4, floor_ffn=4, start=0.2, end=0.6, schedule="linear")
    one.prepare(model, Context())
    kept = []
    for step in range(11):
        one.after_step(model, step / 10)
        kept.append(sum(int(g.mask.sum()) for g in gates(model, "down")))
        now = one.status(model, step / 10)["ffn"]
        assert now["now"] == pytest.approx(1 - kept[-1] / 128) and abs(now["now"] - now["planned"]) <= 2 / 128 + 1e-9
    assert kept[:3] == [128] * 3 and kept[6:] == [64] * 5
    assert all(a >= b for a, b in pairwise(kept))


def test_dropped_neurons_may_return_before_the_end_and_never_after():
    model = tiny()
    one = Structured(ffn=0.5, align=4, floor_ffn=4, start=0.0, end=0.5, momentum=0.0, schedule="constant")
    one.prepare(model, Context())
    first, second = gates(model, "down")

    def push(progress, favourites):
        """A step whose gradients favour these neurons of both layers."""
        for gate in (first, second):
            if gate.mask.requires_grad:
                gate.mask.grad = torch.full_like(gate.mask, 0.1)
                gate.mask.grad[favourites] = 1.0
        one.after_step(model, progress)
        return first.mask.clone()

    one.after_step(model, 0.0)
    low, high = torch.arange(32), torch.arange(32, 64)
    early = push(0.1, low)
    assert early[low].all() and not early[high].any()
    assert not push(0.2, high)[low].any() and first.mask[high].all(), "all of them came back"
    end = push(0.5, low)
    assert end[low].all() and not end[high].any()
    assert not first.mask.requires_grad
    for progress in (0.6, 1.0):
        assert torch.equal(push(progress, high), end)


def test_dropped_neurons_get_gradients_while_they_may_return():
    model, batch = tiny(), labelled()
    one = Structured(ffn=0.5, align=4, floor_ffn=4, start=0.0, end=1.0, schedule="constant")
    run(model, one, batch, steps=3)
    for gate in gates(model, "down"):
        assert (gate.mask == 0).any() and (gate.importance[gate.mask == 0] > 0).any()


def test_the_optimiser_sees_no_gate():
    model = tiny()
    names = {name for name, _ in model.named_parameters()}
    Structured(heads=0.5, ffn=0.5).prepare(model, Context())
    assert {name for name, _ in model.named_parameters()} == names


def test_a_resumed_run_has_the_same_masks():
    one = Structured(heads=0.5, ffn=0.5, align=4, floor_ffn=4, start=0.0, end=0.8)
    first, second, batch = tiny(), tiny(seed=3), labelled()
    run(first, one, batch, steps=5)
    one.after_step(first, 0.5)
    one.prepare(second, Context())
    second.load_state_dict(first.state_dict())
    one.after_step(first, 0.6)
    one.after_step(second, 0.6)
    for path in ("o", "down"):
        for a, b in zip(gates(first, path), gates(second, path), strict=True):
            assert torch.equal(a.mask, b.mask) and a.mask.requires_grad == b.mask.requires_grad
    assert torch.equal(logits(first, batch), logits(second, batch))


def test_only_what_is_asked_for_gets_a_gate():
    model = tiny()
    Structured(heads=0.5).prepare(model, Context())
    names = [n for n, m in model.named_modules() if isinstance(m, ColumnGate)]
    assert names == [f"bert.encoder.layer.{i}.attention.output.dense.gates.structured" for i in (0, 1)]
    assert set(Structured(heads=0.5).status(model, 0.0)) == {"heads"}


def test_contradictions_name_the_fix():
    assert "set one of them" in Structured().check()
    assert "is not after structured.start 0.5" in Structured(ffn=0.5, start=0.5, end=0.5).check()
    assert Structured(ffn=0.5).check() is None
