"""Schedules: ramps and shapes start at 0, end at 1, never fall, and are the formulas of their sources."""

import math
from itertools import pairwise

import pytest

from compressft.transform import SHAPES, ramp

GRID = [i / 97 for i in range(98)]


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.05, 0.6), (0.3, 0.31), (0.0, 0.5)])
def test_ramp_is_the_clipped_line(start, end):
    for progress in GRID:
        assert ramp(progress, start, end) == pytest.approx(min(max((progress - start) / (end - start), 0.0), 1.0))
    assert ramp(start, start, end) == 0.0
    assert ramp(end, start, end) == 1.0


def test_ramp_without_length_is_a_step_at_its_end():
    assert [ramp(p, 0.4, 0.4) for p in (0.0, 0.399, 0.4, 0.401, 1.0)] == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_go_from_0_to_1_and_never_fall(name):
    values = [SHAPES[name](t) for t in GRID]
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert all(a <= b for a, b in pairwise(values))


def test_shapes_are_their_formulas():
    for t in GRID[1:]:
        assert SHAPES["linear"](t) == t
        # Zhu & Gupta 2017, equation 1, with initial sparsity 0 and final sparsity 1: s_f + (s_i - s_f)(1 - t)^3.
        assert SHAPES["cubic"](t) == pytest.approx(1.0 + (0.0 - 1.0) * (1.0 - t) ** 3)
        assert SHAPES["cosine"](t) == pytest.approx(math.sin(math.pi * t / 2) ** 2)
        assert SHAPES["constant"](t) == 1.0


def test_cubic_prunes_earlier_than_linear_and_cosine_is_symmetric():
    for t in GRID[1:-1]:
        assert SHAPES["cubic"](t) > SHAPES["linear"](t)
        assert SHAPES["cosine"](t) + SHAPES["cosine"](1 - t) == pytest.approx(1.0)
