"""What a recipe's target asked for next to what the file has: missed, met, and far surpassed."""

import pytest

from compressft.export.reached import BEYOND, Reached, last_targets, reached, shapes_to_time
from compressft.model.shrink import shapes, shrink
from compressft.recipe.recipe import parse_recipe
from compressft.recipe.recipe import smoke as few_rows
from tests.tiny import tiny


def recipe(*targets):
    """A stage for each target, as gradual pruning has."""
    stages = [
        {"name": f"stage-{i}", "passes": [{"type": "ziplm", "target": target}, "int8"]}
        for i, target in enumerate(targets)
    ]
    return parse_recipe({"name": "asked", "model": "minilm", "data": {"sample": "banking77"}, "stages": stages})


def rows(own, base=10.0, batch=1, length=128):
    place = {"batch": batch, "length": length}
    return [
        {"runtime": "onnxruntime", "model": "compressed", "p50": own, **place},
        {"runtime": "onnxruntime", "model": "base_fp32", "p50": base, **place},
        {"runtime": "torch", "model": "base_fp32", "p50": 99.0, **place},
    ]


def found(asked, latency=(), tensors=0, total=10, base=100):
    model = tiny()
    report = {
        "latency_ms": latency,
        "size_bytes": {"onnx_tensors": tensors},
        "parameters": {"total": total, "base": base},
    }
    return reached(asked, model, report, shapes(model))


@pytest.mark.parametrize(
    ("target", "own", "value", "said"),
    [
        ({"speedup": 9.3}, 1.0, 10.0, None),
        ({"speedup": 9.3}, 4.0, 2.5, "target.speedup: 9.3 was asked for at 1x128, 2.5 was measured. Shapes follow"),
        ({"speedup": 4}, 1.0, 10.0, "target.speedup: 4 was asked for at 1x128, 10 was measured. More was removed"),
        ({"latency_ms": 2.0}, 2.0, 2.0, None),
        ({"latency_ms": 2.0}, 2.125, 2.125, "target.latency_ms: 2 was asked for at 1x128, 2.12 was measured. Shapes"),
        ({"latency_ms": 2.0}, 1.0, 1.0, "target.latency_ms: 2 was asked for at 1x128, 1 was measured. More was"),
    ],
)
def test_times(target, own, value, said):
    (one,) = found(recipe(target), rows(own))
    assert (one.target, one.reached, one.batch, one.length) == (next(iter(target)), value, 1, 128)
    assert (one.note() or "").startswith(said or "") and bool(one.note()) == bool(said)


@pytest.mark.parametrize(
    ("target", "figures", "value", "said"),
    [
        ({"parameters": 0.1}, {"total": 10}, 0.1, None),
        ({"parameters": 0.1}, {"total": 11}, 0.11, "target.parameters: 0.1 was asked for, 0.11 was measured. More has"),
        ({"parameters": 50}, {"total": 20}, 20, "target.parameters: 50 was asked for, 20 was measured. More was"),
        ({"bytes": 4000}, {"tensors": 3990}, 3990, None),
        ({"bytes": 4000}, {"tensors": 4100}, 4100, "target.bytes: 4000 was asked for, 4.1e+03 was measured. More has"),
    ],
)  # fmt: skip
def test_counts(target, figures, value, said):
    (one,) = found(recipe(target), **figures)
    assert (one.reached, one.batch) == (pytest.approx(value), None)
    assert (one.note() or "").startswith(said or "") and bool(one.note()) == bool(said)


def test_sparsity_is_counted_in_heads_and_neurons():
    model = tiny()
    base = shapes(model)
    kept = [{"heads": list(range(shape["kv_heads"] // 2)), "ffn": list(range(shape["ffn"] // 2))} for shape in base]
    import torch

    shrink(model, [{name: torch.tensor(index) for name, index in layer.items()} for layer in kept])
    report = {"latency_ms": [], "size_bytes": {}, "parameters": {}}
    (one,) = reached(recipe({"sparsity": 0.5}), model, report, base)
    assert one.reached == pytest.approx(0.5) and one.note() is None


def test_what_is_left_says_how_far_sparsity_went():
    assert Reached("sparsity", 0.9, 0.95).ratio == pytest.approx(2)
    assert Reached("sparsity", 0.9, 0.95).ratio > BEYOND and "ask for less" in Reached("sparsity", 0.9, 0.95).note()
    assert Reached("sparsity", 0.9, 0.8).ratio == pytest.approx(0.5)


def test_the_last_stage_is_the_file():
    """Gradual pruning's earlier targets are on the way, and would all be surpassed."""
    gradual = recipe({"speedup": 2}, {"speedup": 4}, {"speedup": 8})
    assert [target.speedup for target in last_targets(gradual)] == [8]
    assert [one.asked for one in found(gradual, rows(1.2))] == [8]


def test_the_shape_of_the_target_decides():
    asked = recipe({"speedup": 4, "batch": 8, "length": 64})
    assert found(asked, rows(1.0) + rows(5.0, batch=8, length=64))[0].reached == 2
    assert found(asked, rows(5.0) + rows(1.0, batch=8, length=64))[0].reached == 10
    assert found(asked, rows(5.0)) == [], "it was not measured"


def test_targets_are_timed_in_their_own_shape():
    assert shapes_to_time(recipe({"speedup": 4, "batch": 8, "length": 64})) == [(1, 32), (1, 128), (8, 128), (8, 64)]
    assert shapes_to_time(recipe({"speedup": 4})) == [(1, 32), (1, 128), (8, 128)]
    assert shapes_to_time(recipe({"bytes": 4_000_000, "length": 64})) == [(1, 32), (1, 128), (8, 128)]
    assert shapes_to_time(few_rows(recipe({"speedup": 4}))) == [(1, 32)]
    assert found(few_rows(recipe({"speedup": 4})), rows(1.0)) == [], "a smoke run promises nothing"
