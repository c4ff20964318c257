"""Magnitude pruning: exact numbers, the schedule's points, who may return until when, zeros that last."""

import pytest
import torch
from torch import nn

from compressft.passes.magnitude import Magnitude
from compressft.transform import SHAPES
from tests.passes.sparse import Run, gated, linears, nonzero, sparsity
from tests.tiny import tiny

FAST = {"start": 0.0, "end": 0.5}


def masks(one, model):
    return torch.cat([gate.mask.flatten() for _, gate in gated(one, model)])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.37, 0.9, 0.999])
def test_numbers_are_exact(scope, ties, share):
    model = tiny()
    one = Magnitude(sparsity=share, scope=scope, start=0.0, end=0.5, schedule="linear")
    Run(model, [one], 1)
    if ties:
        with torch.no_grad():
            for linear, _ in gated(one, model):
                linear.weight.copy_(linear.weight.sign() * 0.1)
    for progress in (0.0, 0.2, 0.5, 1.0):
        one.after_step(model, progress)
        kept = 1 - share * min(progress / 0.5, 1.0)
        sizes = [gate.mask.numel() for _, gate in gated(one, model)]
        if scope == "global":
            assert int(masks(one, model).sum()) == round(kept * sum(sizes))
        else:
            assert [int(g.mask.sum()) for _, g in gated(one, model)] == [round(kept * n) for n in sizes]


def test_the_smallest_go_and_scope_says_among_whom():
    for scope in ("global", "layer"):
        model = tiny()
        one = Magnitude(sparsity=0.5, scope=scope, start=0.0, end=0.5)
        Run(model, [one], 1)
        with torch.no_grad():
            gated(one, model)[0][0].weight.mul_(100.0)
        one.after_step(model, 0.5)
        densities = [float(gate.mask.float().mean()) for _, gate in gated(one, model)]
        pairs = [(linear.weight.abs(), gate.mask) for linear, gate in gated(one, model)]
        if scope == "global":
            assert densities[0] > 0.99 and max(densities[1:]) < 0.6
            assert min(w[m].min() for w, m in pairs) >= max(w[~m].max() for w, m in pairs if not m.all())
        else:
            assert set(densities) == {0.5}
            assert all(w[m].min() >= w[~m].max() for w, m in pairs)


@pytest.mark.parametrize("schedule", SHAPES)
def test_masks_change_at_the_points_of_the_schedule_only(schedule):
    model = tiny()
    one = Magnitude(sparsity=0.8, start=0.2, end=0.7, schedule=schedule, updates=5)
    Run(model, [one], 1)
    generator, changes, last = torch.Generator().manual_seed(0), [], masks(one, model)
    for step in range(101):
        with torch.no_grad():
            for linear, _ in gated(one, model):
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        one.after_step(model, step / 100)
        if not torch.equal(masks(one, model), last):
            changes.append(step)
            last = masks(one, model)
            now = one.status(model, step / 100)["sparsity"]
            assert now["now"] == pytest.approx(now["planned"], abs=1e-4)
    assert changes == [21, 30, 40, 50, 60, 70], "six points, the first behind the start, the last at the end"
    assert one.status(model, 1.0)["sparsity"]["now"] == pytest.approx(0.8, abs=1e-4)


def test_dropped_weights_return_while_the_schedule_runs_if_others_fall_behind():
    model = tiny()
    one = Magnitude(sparsity=0.5, start=0.0, end=0.5, schedule="constant")
    Run(model, [one], 1)
    one.after_step(model, 0.1)
    first = masks(one, model)
    with torch.no_grad():
        for linear, gate in gated(one, model):
            linear.weight[gate.mask] *= 1e-6
    one.after_step(model, 0.3)
    assert torch.equal(masks(one, model), ~first)
    with torch.no_grad():
        for linear, gate in gated(one, model):
            linear.weight[gate.mask] *= 1e-9
    one.after_step(model, 0.5)
    end = masks(one, model)
    assert torch.equal(end, first)
    for linear, _ in gated(one, model):
        nn.init.normal_(linear.weight)
    for progress in (0.51, 1.0):
        one.after_step(model, progress)
        assert torch.equal(masks(one, model), end)


def test_pruned_weights_are_zero_after_every_step():
    model = tiny()
    one = Magnitude(sparsity=0.7, start=0.0, end=0.4)

    def look(progress):
        for linear, gate in gated(one, model):
            assert (linear.effective_weight()[~gate.mask] == 0).all()

    run = Run(model, [one], 10)
    run.train(watch=look)
    stored = [linear.weight[~gate.mask] for linear, gate in gated(one, model)]
    assert any((values != 0).any() for values in stored), "momentum and decay leave the stored values alone or not"
    run.finalize()
    assert sparsity(model) == pytest.approx(0.7, abs=1e-4)


def test_a_later_stage_keeps_the_zeros():
    model = tiny()
    first = Run(model, [Magnitude(sparsity=0.7, **FAST)], 4).train()
    first.finalize()
    zeros = {path: module.weight == 0 for path, module in linears(model)}
    again = Run(model, [Magnitude(sparsity=0.7, start=0.0, end=0.1, schedule="constant")], 8).train()
    before = nonzero(model)
    again.finalize()
    assert nonzero(model) == before
    same = sum(int(((module.weight == 0) & zeros[path]).sum()) for path, module in linears(model))
    # The first step of the new stage, before its masks, may move a handful across the border.
    assert same > 0.95 * sum(int(z.sum()) for z in zeros.values())


def test_a_delta_counts_with_the_weight():
    class Shift(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = nn.Parameter(value)

        def forward(self):
            return self.value

    model = tiny()
    one = Magnitude(sparsity=0.5, scope="layer", **FAST)
    Run(model, [one], 1)
    linear, gate = gated(one, model)[0]
    want = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0))
    linear.delta = Shift(want - linear.weight.detach())
    one.after_step(model, 0.5)
    assert want[gate.mask].abs().min() >= want[~gate.mask].abs().max()
    one.finalize(model)
    assert int(linear.weight.count_nonzero()) == want.numel() // 2 and linear.delta is None
