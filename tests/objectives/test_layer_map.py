"""Layer maps: rules, their limits, and the map that is chosen again each step."""

from itertools import combinations, combinations_with_replacement, pairwise

import pytest
import torch

from compressft.errors import UserError
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.layer_map import check, distances, learned, nearest_in_order, origin, uniform
from compressft.passes.depth import Depth
from compressft.transform import Context
from tests.objectives.pair import asked, prepared, terms
from tests.tiny import labelled, tiny


def test_uniform_covers_both_ends():
    for depth in range(1, 13):
        for teacher in range(1, 25):
            pairs = uniform(depth, teacher)
            assert pairs[0] == (0, 0) and pairs[-1] == (depth, teacher) and len(pairs) == depth + 1
            assert all(a[1] <= b[1] for a, b in pairwise(pairs))


def test_origin_follows_what_was_copied():
    assert origin([0, 2, 4, 7, 9, 11], 6, 12) == ((0, 0), (1, 1), (2, 3), (3, 5), (4, 8), (5, 10), (6, 12))
    with pytest.raises(UserError, match=r"as deep as the model was before layers went; this one has 6 layers"):
        origin([0, 11], 2, 6)


def test_pairs_beyond_the_models_are_refused():
    check([(0, 0), (2, 4)], 2, 4)
    with pytest.raises(UserError, match=r"pair \[3, 4\] is beyond the models' 2 and 4 layers"):
        check([(2, 4), (3, 4)], 2, 4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (2, 3), (3, 6), (4, 4), (5, 3)])
def test_nearest_in_order_equals_trying_everything(rows, columns):
    generator = torch.Generator().manual_seed(rows * 10 + columns)
    every = combinations if columns > rows else combinations_with_replacement
    for _ in range(20):
        cost = torch.rand(rows, columns, generator=generator).tolist()
        allowed = [way for way in every(range(columns), rows) if way[-1] == columns - 1]
        want = min(allowed, key=lambda way: sum(cost[i][j] for i, j in enumerate(way)))
        assert nearest_in_order(cost) == list(want)


def test_distances_equal_the_formula():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(2, 3, 4, generator=generator) for _ in range(n)] for n in (2, 3))
    real = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    want = torch.tensor([[(a - b)[real].square().mean() for b in theirs] for a in ours], dtype=torch.double)
    torch.testing.assert_close(distances(ours, theirs, real), want, atol=1e-5, rtol=1e-5)


def test_learned_finds_the_layers_that_were_copied():
    """Student states that are noisy copies of some teacher states, in order."""
    generator = torch.Generator().manual_seed(0)
    theirs = [torch.randn(2, 5, 8, generator=generator) for _ in range(9)]
    real = torch.ones(2, 5).bool()
    for chosen in ((1, 4, 8), (3, 6, 8), (2, 3, 8)):
        ours = [theirs[i] + 0.3 * torch.randn(2, 5, 8, generator=generator) for i in (0, *chosen)]
        assert learned(ours, theirs, real) == ((0, 0), *((i + 1, t) for i, t in enumerate(chosen)))


def test_learned_map_in_the_objective():
    student, teacher, batch = tiny(), tiny(seed=1, num_hidden_layers=4), labelled(4)
    got = asked(student, teacher, batch, hidden=1.0, attention=1.0, layer_map="learned")
    options = {
        t: asked(student, teacher, batch, hidden=1.0, attention=1.0, layer_map=((0, 0), (1, t), (2, 4)))
        for t in (1, 2, 3)
    }
    best = min(options, key=lambda t: options[t]["distill.hidden"].item())
    assert len({round(o["distill.hidden"].item(), 4) for o in options.values()}) == 3
    for name, value in got.items():
        torch.testing.assert_close(value, options[best][name])


def test_last():
    student, teacher, batch = tiny(), tiny(seed=1, num_hidden_layers=4), labelled(4)
    got = asked(student, teacher, batch, hidden=1.0, layer_map="last")
    torch.testing.assert_close(got, asked(student, teacher, batch, hidden=1.0, layer_map=((2, 4),)))


def test_origin_in_the_objective_gives_nothing_where_layers_below_are_copies():
    """Layers 0 and 1 of four: both student layers still see what the teacher's saw."""
    student, teacher, batch = tiny(num_hidden_layers=4), tiny(num_hidden_layers=4), labelled(4)
    depth = Depth(keep=(0, 1))
    objective = Distill(
        teacher="t", hidden=1.0, attention=1.0, relations=1.0, layer_map="origin", relation_map=((2, 2),)
    )
    depth.prepare(student, Context())
    context = Context(transforms=(depth, objective), load_teacher=lambda name: teacher)
    objective.prepare(student, context)
    got = terms(objective, student, batch, context)
    assert got.pop("distill.logits") > 1e-3
    assert len(got) == 3 and all(abs(value.item()) < 1e-6 for value in got.values())
    other = asked(student_without(student, objective), teacher, batch, hidden=1.0)
    assert other["distill.hidden"] > 1e-2


def student_without(student, objective):
    objective.finalize(student)
    return student


@pytest.mark.parametrize("rule", [None, "uniform", "learned"])
def test_a_copy_is_at_no_distance(rule):
    """Also of six layers, each next to its own twin."""
    student, teacher = tiny(num_hidden_layers=6), tiny(num_hidden_layers=6)
    fields = {"logits": 1.0, "hidden": 1.0, "cosine": 1.0, "attention": 1.0, "relations": 1.0, "layer_map": rule}
    objective = Distill(teacher="t", **fields)
    context = prepared(objective, student, teacher)
    got = terms(objective, student, labelled(4), context)
    assert len(got) == 5 and all(abs(value.item()) < 1e-6 for value in got.values())
    sum(got.values()).backward()
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-4
