"""ZipLM: shapes that meet the target, weights that make up for what is gone, the same shapes after a resume."""

import random

import pytest
import torch
import yaml

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy
from compressft.model.costs import CostTable, counted
from compressft.model.count import count
from compressft.model.saved.compressed import load_compressed
from compressft.model.shrink import shapes, shrink
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.state import Distillation
from compressft.passes.depth import Depth
from compressft.passes.int8 import Int8
from compressft.passes.shared.prunable import Shift
from compressft.passes.structured import Structured
from compressft.passes.ziplm import ZipLM
from compressft.recipe.conflict import conflict
from compressft.recipe.recipe import load_recipe, parse_recipe
from compressft.run.flow import run
from compressft.transform import Context, TrainingData
from tests.tiny import SHAPE, TINY, batch_for, fit, labelled, logits, tiny
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl


def data_for(family="bert", rows=24):
    """Training rows without padding and what pads them."""
    draw = random.Random(0)
    pad = TINY[family][1].get("pad_token_id", 0)
    features = [{"input_ids": [draw.randrange(5, 90) for _ in range(3 + i % 9)]} for i in range(rows)]

    def collate(batch):
        width = max(len(f["input_ids"]) for f in batch)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros_like(ids)
        for row, feature in enumerate(batch):
            ids[row, : len(feature["input_ids"])] = torch.tensor(feature["input_ids"])
            mask[row, : len(feature["input_ids"])] = 1
        return {"input_ids": ids, "attention_mask": mask}

    return TrainingData(None, features, collate, lambda tokenizer: features)


def one(target, **fields):
    return ZipLM(**{"target": target, "align": 4, "floor_ffn": 4, **fields})


def table(attention=1.0, ffn=0.02, **fields):
    """Milliseconds per head and neuron of a tiny BERT."""
    return CostTable(groups=(1,), attention=(attention,), neurons=(1,), ffn=(ffn,), **fields)


def timed(costs, **fields):
    return Context(data=data_for(), latency=lambda target, precision: costs, **fields)


@pytest.mark.parametrize("family", TINY)
def test_every_family_meets_its_target(family):
    model = tiny(family)
    heads, groups, _, _ = SHAPE[family]
    before, weights = count(model)["total"], counted(model, "sparsity")
    dense = weights.cost(shapes(model))
    one({"sparsity": 0.6}).prepare(model, Context(data=data_for(family)))
    present = shapes(model)
    assert 0.3 * dense <= weights.cost(present) <= 0.4 * dense
    assert count(model)["total"] < before
    assert all(s["heads"] == s["kv_heads"] * heads // groups and s["ffn"] % 4 == 0 for s in present)
    assert torch.isfinite(logits(model, batch_for(family))).all()


@pytest.mark.parametrize("family", ["bert", "qwen3", "gpt2"])
def test_compensation_beats_plain_removal(family):
    data = data_for(family, rows=200)
    dense, pruned, sliced = tiny(family), tiny(family), tiny(family)
    keep = {}
    context = Context(data=data, memo=lambda key, compute: keep.setdefault(key, compute()))
    one({"sparsity": 0.5}).prepare(pruned, context)
    shrink(sliced, [{name: torch.tensor(kept) for name, kept in layer.items()} for layer in keep["ziplm"]["keep"]])
    assert shapes(sliced) == shapes(pruned)
    shift = Shift(dense, context.calibration(200, "test"))
    errors = []
    for shift.model in (pruned, sliced):
        errors.append(shift())
    assert errors[0] < 0.8 * errors[1]


def test_one_layers_output_is_the_best_its_kept_columns_can_give():
    model, dense, data = tiny(), tiny(), data_for()
    keep = {}
    context = Context(data=data, memo=lambda key, compute: keep.setdefault(key, compute()))
    one({"sparsity": 0.5}, damping=1e-9).prepare(model, context)
    path = "bert.encoder.layer.0.attention.output.dense"
    x = inputs_of(dense, path, data)
    kept = torch.tensor(keep["ziplm"]["keep"][0]["heads"])
    columns = (kept[:, None] * 8 + torch.arange(8)).flatten()
    old, new = dense.get_submodule(path), model.get_submodule(path)
    assert 0 < len(kept) < 4
    ones = torch.ones(len(x), 1)
    want = torch.linalg.lstsq(torch.cat([x[:, columns], ones], 1).double(), (old(x)).double()).solution
    torch.testing.assert_close(new.weight.double(), want[:-1].t(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(new.bias.double(), want[-1], atol=1e-4, rtol=1e-3)


def inputs_of(model, path, data):
    """Real tokens' inputs of a module, (tokens, in)."""
    found = []
    for batch in Context(data=data).calibration(10**6, "test"):
        mask = batch["attention_mask"].bool()
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda module, arguments, mask=mask: found.append(arguments[0][mask].detach())
        )
        model(**batch)
        hook.remove()
    return torch.cat(found)


def test_what_matters_stays():
    model = tiny()
    needed = [1, 4, 7, 20, 33, 41, 50, 63]
    with torch.no_grad():
        for layer in anatomy(model).layers:
            weight = layer.part(layer.family.down).weight
            weight[:, [n for n in range(64) if n not in needed]] *= 1e-4
            layer.part(layer.family.o).weight[:, 8:24] *= 1e-4
    keep = {}
    context = Context(data=data_for(), memo=lambda key, compute: keep.setdefault(key, compute()))
    want = logits(model, batch_for("bert"))
    # Half of the heads and an eighth of the neurons.
    one({"sparsity": 1 - (2 * 4 * 8 * 32 + 8 * 2 * 32) / (4 * 4 * 8 * 32 + 64 * 2 * 32)}).prepare(model, context)
    assert keep["ziplm"]["keep"] == [{"heads": [0, 3], "ffn": needed}] * 2
    torch.testing.assert_close(logits(model, batch_for("bert")), want, atol=1e-2, rtol=1e-2)


def test_a_timed_target_spends_where_time_is_cheap():
    """Neurons that cost nothing stay, heads pay; and the other way round."""
    for costs, name, full in ((table(1.0, 0.0), "ffn", 64), (table(0.0, 1.0), "kv_heads", 4)):
        model = tiny()
        dense = costs.cost(shapes(model))
        one({"latency_ms": dense / 2}).prepare(model, timed(costs))
        assert [s[name] for s in shapes(model)] == [full, full]
        assert dense / 4 <= costs.cost(shapes(model)) <= dense / 2


def test_layers_that_stay_follow_their_own_origin():
    """Two of four layers do nothing and go; distillation counts what is left as it was, after pass `depth` too."""
    model, teacher = tiny(num_hidden_layers=5), tiny(num_hidden_layers=5)
    with torch.no_grad():
        for index in (1, 3):
            layer = model.bert.encoder.layer[index]
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
    memory = {}
    depth, pruning = Depth(keep=(0, 1, 3, 4)), one({"latency_ms": 2.9}, layers=True)
    objective = Distill(teacher="t", hidden=1.0, layer_map="origin")
    context = Context(
        transforms=(depth, pruning, objective),
        data=data_for(),
        memo=lambda key, compute: memory.setdefault(key, memory.get(key) or compute()),
        load_teacher=lambda name: teacher,
        latency=lambda target, precision: table(0.1, 0.001, layer=1.0),
    )
    for part in context.transforms:
        part.prepare(model, context)
    assert pruning.kept(4, context) == [0, 3] and len(model.bert.encoder.layer) == 2
    assert Distillation.of(model).pairs == ((0, 0), (1, 1), (2, 5))
    with pytest.raises(UserError, match="which layers stay is not known here"):
        pruning.kept(4, Context())


def test_speedups_add_up_over_stages():
    model, costs = tiny(), table(rest=0.1)
    base = shapes(model)
    dense = costs.cost(base)
    found = []
    for factor in (1, 1.5, 3):
        one({"speedup": factor}).prepare(model, timed(costs, base=base))
        found.append(costs.cost(shapes(model)))
        assert found[-1] <= dense / factor
    assert found[0] == dense > found[1] > found[2] > dense / 6


def test_a_resumed_run_has_the_same_shapes_though_the_machine_has_another_pace(tmp_path):
    memory = {}

    def memo(key, compute):
        if key not in memory:
            memory[key] = compute()
        return memory[key]

    first, second, other = tiny(), tiny(), tiny()
    half = {"latency_ms": 0.5 * table().cost(shapes(first))}
    one(half).prepare(first, timed(table(), memo=memo))
    slow = table(1.0, 0.06)
    one(half).prepare(second, timed(slow, memo=memo))
    one(half).prepare(other, timed(slow))
    assert shapes(first) == shapes(second) != shapes(other)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_layers_go_where_they_may():
    model, costs = tiny(), table(layer=5.0)
    # Less than two layers cost with one head and four neurons each.
    cheap = {"latency_ms": 11.0}
    with pytest.raises(UserError, match="cannot be reached: the smallest"):
        one(cheap).prepare(model, timed(costs))
    one(cheap, layers=True).prepare(model, timed(costs))
    (left,) = shapes(model)
    assert costs.cost([left]) <= 11.0 and model.config.num_hidden_layers == 1
    assert torch.isfinite(logits(model, batch_for("bert"))).all()


def test_floors_hold():
    model = tiny()
    one({"parameters": 0.7}, floor_heads=3, floor_ffn=20).prepare(model, Context(data=data_for()))
    assert all(s["heads"] >= 3 and s["ffn"] >= 20 for s in shapes(model))


def test_heads_and_neurons_stay_whole_in_a_model_that_keeps_everything():
    model, dense = tiny(), tiny()
    one({"speedup": 1}, damping=1e-9).prepare(model, timed(table()))
    assert shapes(model) == shapes(dense)
    torch.testing.assert_close(logits(model, batch_for("bert")), logits(dense, batch_for("bert")), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [None, Adapter(size=4)])
def test_trains_beside_other_passes(method):
    model, batch = tiny(), labelled()
    passes = [
        one({"sparsity": 0.4}),
        *([method] if method else []),
        Structured(ffn=0.3, align=4, floor_ffn=4, start=0.0, end=0.5),
        Int8(),
    ]
    context = Context(passes, data=data_for())
    for transform in passes:
        transform.prepare(model, context)
    fit(model, passes, [batch], 6, context=context)
    want = logits(model, batch)
    for transform in passes:
        transform.finalize(model)
    torch.testing.assert_close(logits(model, batch), want, atol=1e-3, rtol=1e-3)
    assert sum(s["ffn"] for s in shapes(model)) < 128


def test_needs_rows():
    with pytest.raises(UserError, match="pass ziplm: needs training rows"):
        one({"sparsity": 0.5}).prepare(tiny(), Context())


def test_conflicts_name_the_fix():
    assert "name an earlier stage" in conflict([one({"sparsity": 0.5}), Distill(teacher="self")])
    assert conflict([one({"sparsity": 0.5}), Distill(teacher="dense"), Int8()]) is None


# In a recipe.


def write_recipe(folder, **stage):
    data = write_jsonl(folder / "rows.jsonl", rows_of(40))
    train = {"max_steps": 2, "batch_size": 8, "save": "no", "precision": "fp32"}
    stages = [
        {"name": "dense", "train": train},
        {
            "name": "half",
            "passes": [{"type": "ziplm", "target": {"speedup": 1.6}, "align": 4, "floor_ffn": 4}],
            "objectives": [{"type": "distill", "teacher": "dense", "hidden": 1.0}],
            "train": train,
        },
        {
            "name": "quarter",
            "passes": [{"type": "ziplm", "target": {"speedup": 3}, "align": 4, "floor_ffn": 4}, {"type": "int8"}],
            "train": train,
        },
    ]
    return document(save_tiny(folder / "base"), data, stages=stages, export={"enabled": False})


@pytest.mark.dear
def test_a_gradual_run_measures_once_for_what_it_ships(tmp_path, monkeypatch):
    asked = []

    def fake(deployment, batch, length):
        asked.append((deployment.int8 is not None, batch, length, deployment.architecture.__name__))
        return table(rest=0.2, about={"unit": "milliseconds", "between_nodes": -0.003})

    # The fp32 file of the dense model is slower than the int8 arithmetic of the table; speedups count from it.
    reference = 1.25 * table(rest=0.2).cost([{"kv_heads": 4, "ffn": 64}] * 2)
    monkeypatch.setattr("compressft.run.costs.measure_table", fake)
    monkeypatch.setattr("compressft.run.costs.measure_reference", lambda deployment, batch, length, between: reference)
    # A whole model takes what its parts add up to.
    monkeypatch.setattr(
        "compressft.run.costs.measure_shapes", lambda deployment, layers, *_: table(rest=0.2).cost(layers)
    )
    run(parse_recipe(write_recipe(tmp_path)), tmp_path / "run")
    # The first pruned stage already counts in the arithmetic that the recipe ends with, and the table serves both.
    assert asked == [(True, 1, 128, "BertForSequenceClassification")]
    costs = table(rest=0.2)
    half, quarter = (shapes(load_compressed(tmp_path / "run" / "stages" / name)) for name in ("half", "quarter"))
    assert costs.cost(half) <= reference / 1.6 < 1.3 * costs.cost(half)
    assert costs.cost(quarter) <= reference / 3 < 1.3 * costs.cost(quarter)
    assert (tmp_path / "run" / "memo" / "latency-1x128-int8.json").is_file()


def test_a_recipe_survives_its_own_yaml(tmp_path):
    recipe = parse_recipe(write_recipe(tmp_path))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml").hash == recipe.hash
    stages = yaml.safe_load(recipe.to_yaml())["stages"]
    assert stages[1]["passes"][0]["target"]["speedup"] == 1.6


def test_two_quantities_are_refused_with_the_path(tmp_path):
    recipe = write_recipe(tmp_path)
    recipe["stages"][1]["passes"][0]["target"] = {"speedup": 2, "bytes": 9}
    with pytest.raises(UserError, match=r"pass ziplm.target: give exactly one of latency_ms, speedup"):
        parse_recipe(recipe)
