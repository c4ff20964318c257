"""Targets: one quantity each, tables that count what the model has, and choices that nothing affordable beats."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.costs import CostTable, LayerCosts, counted, monotone
from compressft.model.count import count
from compressft.model.shrink import drop_layers, resize, shapes
from compressft.passes.shared.choice import CELLS, Floors, best, choose, choose_by_importance, sizes_allowed, tried
from compressft.passes.shared.target import Target, cost_table
from compressft.transform import Context
from tests.share import drawn
from tests.tiny import TINY, tiny

TABLE = CostTable(
    groups=(1, 2, 4), attention=(3.0, 4.0, 7.0), neurons=(8, 24, 64), ffn=(1.0, 2.0, 6.0), layer=0.5, rest=10.0
)
# The last layer costs a fraction.
ENDING = TABLE.model_copy(
    update={"last": LayerCosts(groups=(1, 4), attention=(0.75, 1.5), neurons=(8, 64), ffn=(0.25, 0.5), layer=0.25)}
)


def layers(*pairs):
    return [{"kv_heads": heads, "ffn": ffn} for heads, ffn in pairs]


# Targets.


@pytest.mark.parametrize("given", [{}, {"speedup": 2, "bytes": 100}, {"batch": 4}])
def test_exactly_one_quantity(given):
    with pytest.raises(ValidationError, match="exactly one of latency_ms, speedup, parameters, bytes, sparsity"):
        Target(**given)


@pytest.mark.parametrize(
    "given", [{"speedup": 0.5}, {"sparsity": 1.0}, {"latency_ms": 0}, {"speedup": 2, "precision": "int3"}]
)
def test_impossible_values_are_refused(given):
    with pytest.raises(ValidationError):
        Target(**given)


def test_budgets():
    base = layers((4, 64), (4, 64))
    dense = TABLE.cost(base)
    assert dense == 10.0 + 2 * (7.0 + 6.0 + 0.5)
    assert Target(latency_ms=3.0).budget(TABLE, base) == 3.0
    assert Target(speedup=4).budget(TABLE, base) == dense / 4
    assert Target(parameters=0.25).budget(TABLE, base) == dense / 4
    assert Target(parameters=12).budget(TABLE, base) == 12
    assert Target(bytes=20).budget(TABLE, base) == 20
    assert Target(sparsity=0.75).budget(TABLE, base) == dense / 4


# Tables.


def test_costs_are_exact_on_the_grid_linear_between_and_zero_where_a_part_is_gone():
    assert [TABLE.attention_cost(n) for n in (0, 1, 2, 3, 4, 5)] == [0.0, 3.0, 4.0, 5.5, 7.0, 8.5]
    assert [TABLE.ffn_cost(n) for n in (0, 1, 8, 16, 24, 44, 64)] == [0.0, 1.0, 1.0, 1.5, 2.0, 4.0, 6.0]
    assert TABLE.cost(layers((0, 0))) == 10.0
    assert TABLE.cost(layers((0, 8))) == 11.5
    assert TABLE.cost(layers((1, 8), (3, 16))) == 10.0 + 4.5 + 7.5


def test_one_grid_point_is_a_cost_per_unit():
    one = TABLE.model_copy(update={"groups": (1,), "attention": (2.5,)})
    assert [one.attention_cost(n) for n in (0, 1, 7)] == [0.0, 2.5, 17.5]


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": (1, 2)},
        {"groups": (1, 4, 2)},
        {"groups": (0, 1, 2)},
        {"attention": (3.0, 2.0, 7.0)},
        {"ffn": (1.0, 2.0, float("nan"))},
    ],
)
def test_broken_tables_are_refused(wrong):
    with pytest.raises(ValidationError):
        CostTable(**{**TABLE.model_dump(), **wrong})


def test_a_table_survives_json():
    assert CostTable.model_validate_json(TABLE.model_dump_json()) == TABLE


def test_monotone_is_the_nearest_non_decreasing_sequence():
    assert monotone([1, 2, 3]) == [1, 2, 3]
    assert monotone([3, 1, 2]) == [2, 2, 2]
    assert monotone([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = torch.rand(9, generator=generator).tolist()
        smooth = monotone(values)
        assert all(a <= b for a, b in pairwise(smooth)) and sum(smooth) == pytest.approx(sum(values))
        error = sum((a - b) ** 2 for a, b in zip(values, smooth, strict=True))
        for _ in range(200):
            other = (torch.tensor(smooth) + 0.05 * torch.randn(9, generator=generator)).sort().values.tolist()
            assert sum((a - b) ** 2 for a, b in zip(values, other, strict=True)) >= error - 1e-9


@pytest.mark.parametrize("family", TINY)
def test_counted_parameters_are_those_of_the_shrunk_model(family):
    model = tiny(family)
    table = counted(model, "parameters")
    assert table.cost(shapes(model)) == count(model)["total"]
    resize(model, layers((1, 24), (2, 8)))
    assert table.cost(shapes(model)) == count(model)["total"]
    drop_layers(model, [1])
    assert table.cost(shapes(model)) == count(model)["total"]


@pytest.mark.parametrize("family", TINY)
def test_counted_weights_are_those_of_the_layers_matrices(family):
    model = tiny(family)
    table = counted(model, "sparsity")

    def weights():
        parts = [layer.part(path) for layer in anatomy(model).layers for path in layer.linears]
        return sum(part.weight.numel() for part in parts)

    assert table.cost(shapes(model)) == weights()
    resize(model, layers((1, 24), (2, 8)))
    assert table.cost(shapes(model)) == weights()


def test_bytes_by_hand():
    model = tiny("bert")
    fp32, int8 = counted(model, "bytes"), counted(model, "bytes", "int8")
    base = shapes(model)
    assert fp32.cost(base) == 4 * count(model)["total"]
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    others = count(model)["total"] - sum(m.weight.numel() for m in matrices)
    # One byte per weight, four per row's scale and per other parameter.
    want = sum(m.weight.numel() + 4 * m.weight.shape[0] for m in matrices) + 4 * others
    assert int8.cost(base) == want
    # A head: three projections of 8 rows of 32 weights, scale and bias, and 8 columns of the output's 32 rows.
    assert int8.attention_cost(1) == 3 * 8 * (32 + 8) + 8 * 32
    assert int8.ffn_cost(1) == (32 + 8) + 32
    assert fp32.attention_cost(1) == 4 * (3 * 8 * 33 + 8 * 32)


# Choices.


def random_losses(seed, depth=2, zero=False):
    generator = np.random.default_rng(seed)

    def falling(sizes):
        values = np.sort(generator.random(len(sizes)))[::-1]
        return dict(zip(sizes, values.tolist(), strict=True))

    first = [0] if zero else []
    return [falling([*first, 1, 2, 3, 4]) for _ in range(depth)], [
        falling([*first, 8, 24, 40, 64]) for _ in range(depth)
    ]


def brute(table, budget, attention, ffn, modules=False):
    """Least loss over all combinations."""
    options = []
    for a, f in zip(attention, ffn, strict=True):
        both = product(a, f)
        options.append([(h, n) for h, n in both if modules or bool(h) == bool(n)])
    best = float("inf")
    for combination in product(*options):
        if table.cost(layers(*combination)) <= budget + 1e-9:
            best = min(best, sum(a[h] + f[n] for a, f, (h, n) in zip(attention, ffn, combination, strict=True)))
    return best


def lost(chosen, attention, ffn):
    return sum(a[s["kv_heads"]] + f[s["ffn"]] for s, a, f in zip(chosen, attention, ffn, strict=True))


@pytest.mark.parametrize("mode", ["parts stay", "layers may go", "modules may go"])
@pytest.mark.parametrize("seed", drawn(1, range(4)))
@pytest.mark.parametrize("table", [TABLE, ENDING], ids=["all alike", "another last one"])
def test_no_affordable_choice_loses_less(table, seed, mode):
    attention, ffn = random_losses(seed, zero=mode != "parts stay")
    modules = mode == "modules may go"
    dense, least = table.cost(layers((4, 64), (4, 64))), table.cost(layers((1, 8), (1, 8)))
    for budget in np.linspace(least, dense, 23):
        chosen = choose(table, budget, attention, ffn, modules)
        assert table.cost(chosen) <= budget + 1e-9
        loss = lost(chosen, attention, ffn)
        assert loss >= brute(table, budget, attention, ffn, modules) - 1e-9
        # Each of the four parts rounds up by less than a cell.
        assert loss <= brute(table, budget - 4 * 37.0 / CELLS, attention, ffn, modules) + 1e-9


def test_the_last_layer_that_stays_has_its_own_costs():
    assert ENDING.cost(layers((4, 64), (2, 24))) == pytest.approx(10.0 + 13.5 + 0.75 + 0.25 + 0.25 + 0.25 + 0.5 / 7)
    assert ENDING.cost(layers((4, 64), (0, 0))) == ENDING.cost(layers((4, 64))) == 10.0 + 1.5 + 0.5 + 0.25
    assert ENDING.cost(layers((0, 0))) == 10.0


def test_any_layer_may_become_the_last():
    """The second layer is worth less, but the first one alone fits only as the last one."""
    attention, ffn = [{0: 1.0, 4: 0.0}, {0: 0.5, 4: 0.0}], [{0: 1.0, 64: 0.0}, {0: 0.5, 64: 0.0}]
    alone = ENDING.cost(layers((4, 64)))
    assert choose(ENDING, alone, attention, ffn) == layers((4, 64), (0, 0))
    assert choose(ENDING, ENDING.cost(layers((4, 64), (4, 64))), attention, ffn) == layers((4, 64), (4, 64))
    with pytest.raises(UserError, match=r"the smallest model that may be chosen takes 10;"):
        choose(ENDING, 9.0, attention, ffn)


def test_layers_go_whole_unless_modules_may():
    attention, ffn = [{0: 0.1, 1: 0.0}], [{0: 9.0, 8: 0.0}]
    assert choose(TABLE, 11.5, attention, ffn, modules=True) == layers((0, 8))
    assert choose(TABLE, 11.5, attention, ffn) == layers((0, 0))
    assert choose(TABLE, 14.5, attention, ffn) == layers((1, 8))


def test_loss_never_grows_with_the_budget():
    attention, ffn = random_losses(7, depth=3)
    losses = [lost(choose(TABLE, budget, attention, ffn), attention, ffn) for budget in np.linspace(24.0, 51.0, 120)]
    assert all(a >= b for a, b in pairwise(losses)) and losses[0] > losses[-1]


@pytest.mark.parametrize("budget", [3.0, 9.999, 18.0])
def test_an_impossible_budget_names_the_smallest_model(budget):
    attention, ffn = random_losses(0)
    table = TABLE.model_copy(update={"about": {"unit": "milliseconds"}})
    with pytest.raises(UserError, match=r"cannot be reached: the smallest .* takes 19 ms"):
        choose(table, budget, attention, ffn)


def test_a_budget_just_below_a_model_does_not_buy_it():
    attention, ffn = [{1: 1.0, 2: 0.0}] * 2, [{8: 1.0, 24: 0.0}] * 2
    cost = TABLE.cost(layers((2, 24), (2, 24)))
    assert choose(TABLE, cost, attention, ffn) == layers((2, 24), (2, 24))
    for share in (1e-7, 1e-5, 1e-3):
        assert TABLE.cost(choose(TABLE, cost * (1 - share), attention, ffn)) < cost * (1 - share)


def test_an_ample_budget_keeps_everything():
    attention, ffn = random_losses(1)
    assert choose(TABLE, 1e9, attention, ffn) == layers((4, 64), (4, 64))
    assert choose(TABLE, TABLE.cost(layers((4, 64), (4, 64))), attention, ffn) == layers((4, 64), (4, 64))


@pytest.mark.parametrize(
    ("size", "align", "floor", "want"),
    [(4, 1, 1, [1, 2, 3, 4]), (64, 32, 32, [32, 64]), (50, 32, 1, [32, 50]), (20, 32, 32, [20]), (9, 2, 5, [6, 8, 9])],
)
def test_sizes_allowed(size, align, floor, want):
    assert sizes_allowed(size, align, floor) == want


def test_importance_is_kept_where_it_is():
    heads = [torch.tensor([5.0, 5.0, 5.0, 5.0]), torch.tensor([0.0, 9.0, 0.0, 0.0])]
    ffn = [torch.full((64,), 0.01), torch.full((64,), 1.0)]
    budget = TABLE.cost(layers((4, 8), (1, 64)))
    assert choose_by_importance(TABLE, budget, heads, ffn, Floors(align=8, ffn=8)) == layers((4, 8), (1, 64))


def test_importance_lost_is_that_of_the_lowest_scores():
    heads = [torch.tensor([1.0, 4.0, 2.0])]
    ffn = [torch.tensor([3.0, 0.5, 1.0])]
    table = CostTable(groups=(1,), attention=(1.0,), neurons=(1,), ffn=(1.0,))
    # Three units: neurons 3.0 and heads 4.0, 2.0 are worth most.
    assert choose_by_importance(table, 3.0, heads, ffn) == layers((2, 1))
    assert choose_by_importance(table, 5.0, heads, ffn) == layers((3, 2))


# In a run.


def test_relative_targets_count_from_the_recipes_model():
    model = tiny()
    base = shapes(model)
    resize(model, layers((2, 32), (2, 32)))
    half = cost_table(model, Target(sparsity=0.5), Context(base=base), "pass x")[1]
    quarter = cost_table(model, Target(sparsity=0.5), Context(), "pass x")[1]
    assert half == 2 * quarter


def test_a_timed_target_asks_for_the_shipped_arithmetic():
    asked = []

    def latency(target, precision):
        asked.append((target.length, precision))
        return TABLE

    context = Context(ships="int8", latency=latency)
    cost_table(tiny(), Target(speedup=2, length=64), context, "pass x")
    cost_table(tiny(), Target(latency_ms=2, precision="fp32"), context, "pass x")
    assert asked == [(64, "int8"), (128, "fp32")]


def test_targets_that_nothing_can_cost_are_refused():
    with pytest.raises(UserError, match=r"pass x.target.speedup: has to be measured; run it in a recipe's stage"):
        cost_table(tiny(), Target(speedup=2), Context(), "pass x")
    with pytest.raises(UserError, match=r"ships in int4, .* set target.precision to int8 or fp32"):
        cost_table(tiny(), Target(bytes=9), Context(ships="int4"), "pass x")
    cost_table(tiny(), Target(parameters=0.5), Context(ships="int4"), "pass x")


# Choices that are measured.

LOSSES = [{1: 3.0, 2: 1.0, 3: 0.5, 4: 0.0}] * 4, [{8: 4.0, 16: 2.0, 24: 1.0, 40: 0.5, 64: 0.0}] * 4


@pytest.mark.parametrize("off", [0.4, 0.6, 1.0, 1.5])
def test_what_a_whole_model_takes_corrects_the_table(off):
    """A whole model that takes `off` of what its parts add up to: the budget is used, and held."""
    budget, measured = 44.0, []

    def measure(shapes):
        measured.append(off * TABLE.cost(shapes))
        return measured[-1]

    found = best(tried(lambda most: choose(TABLE, most, *LOSSES), TABLE, budget, measure), budget)
    assert found.measured <= budget
    # No finer choice than the sizes allow, and no more than the whole model is there.
    whole = off * TABLE.cost(layers(*[(4, 64)] * 4))
    assert found.measured >= 0.9 * min(budget, whole)
    assert len(measured) <= 3
    if off == 0.4:
        assert measured[0] < 0.5 * budget, "the table alone would have removed far more than was asked"


def test_a_budget_that_no_choice_holds_gets_the_cheapest():
    def measure(shapes):
        return 60.0 + TABLE.cost(shapes)

    trials = tried(lambda most: choose(TABLE, most, *LOSSES), TABLE, 60.0, measure)
    assert len(trials) == 2
    assert best(trials, 60.0).measured == min(one.measured for one in trials) < trials[0].measured
    with pytest.raises(UserError, match="cannot be reached"):
        tried(lambda most: choose(TABLE, most, *LOSSES), TABLE, 5.0, measure)
