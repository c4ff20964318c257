"""`structured` with a target: shapes that fit the budget, keep what matters, and say early what cannot be reached."""

import pytest
import torch

from compressft.errors import UserError
from compressft.model.costs import CostTable, counted
from compressft.model.count import count
from compressft.model.shrink import shapes
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.tiny import fit, labelled, logits, tiny

FIELDS = {"align": 8, "floor_ffn": 8, "start": 0.0, "end": 0.5}
# One attention group costs as much as 32 neurons; a layer and the rest cost something whatever is in them.
TABLE = CostTable(
    groups=(1, 4),
    attention=(1.0, 2.5),
    neurons=(8, 64),
    ffn=(0.5, 4.0),
    layer=0.25,
    rest=1.0,
    about={"unit": "milliseconds"},
)


def trained(one, model, context, steps=8):
    one.prepare(model, context)
    fit(model, [one], [labelled()], steps, 1e-3, context)
    return logits(model, labelled(4, seed=8))


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen3"])
@pytest.mark.parametrize("fraction", [0.4, 0.6])
def test_a_fraction_of_the_weights(family, fraction):
    model = tiny(family)
    table = counted(model, "sparsity")
    full = table.cost(shapes(model))
    one = Structured(target={"sparsity": fraction}, **FIELDS)
    before = trained(one, model, Context())
    status = one.status(model, 1.0)["cost"]
    one.finalize(model)
    torch.testing.assert_close(logits(model, labelled(4, seed=8)), before, atol=1e-5, rtol=1e-5)
    cost = table.cost(shapes(model))
    assert cost <= full * (1 - fraction)
    assert cost > full * (1 - fraction - 0.2), "far more than the target was removed"
    assert status["target"] == pytest.approx(fraction) and status["now"] == pytest.approx(1 - cost / full)


def test_milliseconds_come_from_the_table():
    asked = []

    def latency(target, precision):
        asked.append((target.batch, target.length, precision))
        return TABLE

    model = tiny()
    base = shapes(model)
    one = Structured(target={"speedup": 2, "batch": 8}, **FIELDS)
    trained(one, model, Context(latency=latency, ships="int8", base=base))
    one.finalize(model)
    assert asked == [(8, 128, "int8")]
    assert TABLE.cost(base) / TABLE.cost(shapes(model)) >= 2


def test_the_schedule_moves_the_budget():
    model = tiny()
    one = Structured(target={"sparsity": 0.8}, schedule="linear", **FIELDS)
    one.prepare(model, Context())
    generator = torch.Generator().manual_seed(0)
    for layer in model.bert.encoder.layer:
        for linear in (layer.attention.output.dense, layer.output.dense):
            linear.gates["structured"].importance.uniform_(generator=generator)
    seen = []
    for progress in (0.0, 0.1, 0.25, 0.4, 0.5, 1.0):
        one.after_step(model, progress)
        seen.append(one.status(model, progress)["cost"]["now"])
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] == seen[-2] >= 0.8
    # The budget is never exceeded, so what is saved is what was planned or a little more.
    assert 0.4 <= seen[2] < 0.55


def test_the_most_important_stay_across_layers():
    model = tiny()
    one = Structured(target={"sparsity": 0.5}, **FIELDS)
    one.prepare(model, Context())
    for index, layer in enumerate(model.bert.encoder.layer):
        layer.attention.output.dense.gates["structured"].importance.copy_(
            torch.tensor([1.0, 9.0, 2.0, 8.0]) / (1 + 9 * index)
        )
        layer.output.dense.gates["structured"].importance.copy_(torch.arange(64.0) / 64 / (1 + 9 * index))
    one.after_step(model, 1.0)
    one.finalize(model)
    first, second = shapes(model)
    assert first["heads"] > second["heads"] and first["ffn"] > second["ffn"]


@pytest.mark.parametrize(("head", "heads", "ffn"), [(5.0, 8, 64), (3.0, 4, 128)])
def test_heads_and_neurons_are_weighed_in_one_unit(head, heads, ffn):
    """A head costs what 16 neurons cost. Their gradients add up at random signs: it is worth them from 4 = sqrt(16)."""
    model = tiny()
    one = Structured(target={"sparsity": 0.25}, **FIELDS)
    one.prepare(model, Context())
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense.gates["structured"].importance.fill_(head)
        layer.output.dense.gates["structured"].importance.fill_(1.0)
    one.after_step(model, 1.0)
    one.finalize(model)
    assert [sum(s[kind] for s in shapes(model)) for kind in ("heads", "ffn")] == [heads, ffn]


def test_a_target_beyond_the_floors_is_refused_before_training():
    with pytest.raises(UserError, match="cannot be reached: the smallest model"):
        Structured(target={"sparsity": 0.99}, **FIELDS).prepare(tiny(), Context())
    with pytest.raises(UserError, match=r"structured\.target\.speedup: has to be measured"):
        Structured(target={"speedup": 2}).prepare(tiny(), Context())


def test_contradictions():
    assert "leave out heads" in Structured(target={"speedup": 2}, heads=0.5).check()
    assert "learned gates take sparsity" in Structured(target={"speedup": 2}, decide="learned").check()
    assert Structured(target={"speedup": 2}, layers=0.5).check() is None


def test_whole_layers_beside_a_target():
    model = tiny(num_hidden_layers=4)
    one = Structured(target={"sparsity": 0.3}, layers=0.5, **FIELDS)
    before = trained(one, model, Context())
    one.finalize(model)
    torch.testing.assert_close(logits(model, labelled(4, seed=8)), before, atol=1e-5, rtol=1e-5)
    # The target counts from the whole model: dropping half of the layers has met it.
    assert [(s["heads"], s["ffn"]) for s in shapes(model)] == [(4, 64), (4, 64)]
    assert count(model)["total"] < count(tiny(num_hidden_layers=4))["total"]
