"""Block movement pruning: tiles and neurons in exact numbers, and what is entirely dead is really removed."""

import pytest
import torch

from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.shrink import shapes
from compressft.model.surgery import compress_linear
from compressft.passes.block import Block
from tests.passes.sparse import Run, classifier, gated, weight
from tests.tiny import labelled, logits, tiny

FAST = {"start": 0.0, "end": 0.5}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("tile", "ffn"), [(8, "neurons"), (8, "tiles"), (6, "neurons"), (7, "tiles"), (100, "tiles")])
def test_numbers_are_exact_for_tiles_that_do_not_fit(tile, ffn, scope):
    model = tiny()
    one = Block(sparsity=0.45, tile=tile, ffn=ffn, scope=scope, **FAST)
    Run(model, [one], 4).train()
    side = -(-32 // tile)
    attention = [side * side] * 8
    wide = [64] * 2 if ffn == "neurons" else [side * -(-64 // tile)] * 4
    gates = [gate for _, gate in gated(one, model)]
    sizes = [gate.scores.numel() for gate in gates]
    assert sorted(sizes) == sorted(attention + wide)
    if scope == "layer":
        assert [int(g.mask.sum()) for g in gates] == [round(0.55 * n) for n in sizes]
    else:
        now = one.status(model, 1.0)
        assert now["attention"]["now"] == pytest.approx(1 - round(0.55 * sum(attention)) / sum(attention))
        assert now["ffn"]["now"] == pytest.approx(1 - round(0.55 * sum(wide)) / sum(wide))


def test_dead_neurons_leave_the_model():
    model, batch = tiny(), labelled(seed=7)
    before = count(model)["total"]
    run = Run(model, [Block(sparsity=0.5, tile=8, exclude=("q", "k", "v", "o"), **FAST)], 6).train()
    want = logits(model, batch)
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    assert sum(x["ffn"] for x in shapes(model)) == 64 and all(x["heads"] == 4 for x in shapes(model))
    assert count(model)["total"] == before - 64 * 65


def settle(model, edit, **fields):
    """Prepare, let `edit(layer, gate_of)` choose scores, prune at the end's extent, compare around finalize."""
    one = Block(**{"sparsity": 0.5, "tile": 8, "scope": "layer", **FAST, **fields})
    run = Run(model, [one], 1)
    for layer in anatomy(model).layers:
        edit(layer, lambda part, layer=layer: layer.part(part).gates["block"])
    batch = labelled(seed=7)
    want = logits(model, batch)
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    return shapes(model)


def kill(gate, rows=slice(None), columns=slice(None)):
    """Tiles that are dead from now on."""
    with torch.no_grad():
        gate.scores[rows, columns] = -1.0
        gate.threshold.fill_(-0.5)


def test_heads_without_output_leave_the_model():
    def edit(layer, gate):
        kill(gate(layer.family.o), columns=slice(layer.index, layer.index + 2))

    assert settle(tiny(), edit) == [{"heads": 2, "kv_heads": 2, "ffn": 64}] * 2


def test_heads_without_values_leave_the_model_if_nothing_else_speaks_for_them():
    def edit(layer, gate):
        kill(gate(layer.family.v), rows=slice(1, 2))

    assert [x["heads"] for x in settle(tiny(), edit)] == [4, 4], "their biases are values"
    model = tiny()
    for layer in anatomy(model).layers:
        torch.nn.init.zeros_(layer.part(layer.family.v).bias)
    assert [x["heads"] for x in settle(model, edit)] == [3, 3]
    model = tiny()
    for layer in anatomy(model).layers:
        path = f"{layer.name}.{layer.family.v}"
        torch.nn.init.zeros_(layer.part(layer.family.v).bias)
        compress_linear(model, path).adapter = torch.nn.Sequential(torch.nn.Linear(32, 32))
    assert [x["heads"] for x in settle(model, edit)] == [4, 4], "an adapter adds to them"


def test_queries_alone_kill_no_head():
    def edit(layer, gate):
        kill(gate(layer.family.q))
        kill(gate(layer.family.k), rows=slice(0, 2))

    assert [x["heads"] for x in settle(tiny(), edit)] == [4, 4]


def test_grouped_heads_go_with_their_whole_group():
    def one_head(layer, gate):
        kill(gate("self_attn.o_proj"), columns=slice(0, 2))

    def one_group(layer, gate):
        kill(gate("self_attn.o_proj"), columns=slice(4, 8))

    def values(layer, gate):
        kill(gate("self_attn.v_proj"), rows=slice(0, 2))

    for edit, groups in ((one_head, 2), (one_group, 1), (values, 1)):
        model = classifier("qwen3")[0]
        assert [x["kv_heads"] for x in settle(model, edit)] == [groups] * 2
        assert [x["heads"] for x in shapes(model)] == [2 * groups] * 2


def test_fused_projections_values_are_their_last_third():
    model = classifier("gpt2")[0]
    for layer in anatomy(model).layers:
        torch.nn.init.zeros_(layer.part("attn.c_attn").bias)

    def edit(layer, gate):
        kill(gate("attn.c_attn"), rows=slice(8, 9) if layer.index else slice(4, 5))

    # Row tile 8 is head 0's values; row tile 4 its keys.
    assert [x["heads"] for x in settle(model, edit)] == [4, 3]


@pytest.mark.parametrize("ffn", ["neurons", "tiles"])
def test_one_of_everything_stays(ffn):
    def edit(layer, gate):
        for part in (layer.family.o, layer.family.down):
            kill(gate(part))

    assert settle(tiny(), edit, ffn=ffn) == [{"heads": 1, "kv_heads": 1, "ffn": 1}] * 2


def test_tiles_that_remain_are_left_as_zeros():
    model = tiny()
    run = Run(model, [Block(sparsity=0.5, tile=8, scope="layer", **FAST)], 4).train()
    run.finalize()
    for layer in anatomy(model).layers:
        query = weight(layer.part(layer.family.q))
        rows = query.shape[0] // 8
        dead = query.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).abs().sum((1, 3)) == 0
        assert dead.shape == (rows, 4) and dead.any()


def test_ranges_leave_out_what_will_be_removed():
    """Heads of half a tile's width more than one tile: only a whole head's columns are gone."""
    model = classifier("llama")[0]
    one = Block(sparsity=0.5, tile=8, **FAST)
    Run(model, [one, Adapter(size=4)], 1)
    layer = anatomy(model).layers[0]
    gate = layer.part("self_attn.o_proj").gates["block"]
    kill(gate, columns=slice(0, 3))
    assert gate.columns().all(), "three of the group's four tiles are dead"
    kill(gate, columns=slice(0, 4))
    assert gate.columns().tolist() == [0.0] * 32 + [1.0] * 32
