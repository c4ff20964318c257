"""A file that is slower than its recipe asked says so."""

import pytest

from compressft.export.reached import missed, shapes_to_time
from compressft.recipe import parse_recipe
from compressft.recipe import smoke as few_rows


def recipe(**target):
    stages = [{"name": "one", "passes": [{"type": "ziplm", "target": target}, "int8"]}]
    return parse_recipe({"name": "asked", "model": "minilm", "data": {"sample": "banking77"}, "stages": stages})


def rows(own, base=10.0, batch=1, length=128):
    place = {"batch": batch, "length": length}
    return [
        {"runtime": "onnxruntime", "model": "compressed", "p50": own, **place},
        {"runtime": "onnxruntime", "model": "base_fp32", "p50": base, **place},
        {"runtime": "torch", "model": "base_fp32", "p50": 99.0, **place},
    ]


@pytest.mark.parametrize(
    ("target", "own", "said"),
    [
        ({"speedup": 9.3}, 1.0, None),
        ({"speedup": 9.3}, 4.0, "target.speedup: 9.3 was asked for at 1x128, 2.5 was measured."),
        ({"latency_ms": 2.0}, 2.0, None),
        ({"latency_ms": 2.0}, 2.125, "target.latency_ms: 2 was asked for at 1x128, 2.12 was measured."),
        ({"parameters": 0.1}, 50.0, None),
    ],
)
def test_what_was_asked_against_what_was_measured(target, own, said):
    found = missed(recipe(**target), rows(own))
    assert [note.split(" Shapes")[0] for note in found] == ([said] if said else [])


def test_the_shape_of_the_target_decides():
    asked = recipe(speedup=4, batch=8, length=64)
    assert missed(asked, rows(1.0) + rows(5.0, batch=8, length=64)) != []
    assert missed(asked, rows(5.0) + rows(1.0, batch=8, length=64)) == []
    assert missed(asked, rows(5.0)) == [], "it was not measured"


def test_targets_are_timed_in_their_own_shape():
    assert shapes_to_time(recipe(speedup=4, batch=8, length=64)) == [(1, 32), (1, 128), (8, 128), (8, 64)]
    assert shapes_to_time(recipe(speedup=4)) == [(1, 32), (1, 128), (8, 128)]
    assert shapes_to_time(recipe(bytes=4_000_000, length=64)) == [(1, 32), (1, 128), (8, 128)]
    assert shapes_to_time(few_rows(recipe(speedup=4))) == [(1, 32)]
