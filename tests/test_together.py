"""The joint run: every pass next to every method, present or added later, and sensible sets of passes at once."""

import itertools

import numpy as np
import pytest
import torch

from compressft.data.source import DataConfig
from compressft.data.splits import Splits
from compressft.evaluation.logits import model_logits, open_session, session_logits
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.methods import METHODS
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.source import load_tokenizer
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.passes.shared.trim import trim
from compressft.recipe.program import Stage
from compressft.recipe.recipe import Feed
from compressft.run.feed import FeedRows
from compressft.tasks import make_task
from compressft.transform import Context
from tests.settings import fields
from tests.share import drawn, rank
from tests.tiny import fit, tiny
from tests.tiny_adapters import joint_adapters
from tests.tiny_folder import rows_of

# What is hardest to stand next to: other shapes and another arithmetic; parts of its own behind every projection.
HARD_PASSES, HARD_METHOD = (("structured", "int8"), ("structured",), ("int8",), ("movement",)), "adapter"
LABELS = ("even", "odd")


@pytest.fixture(scope="module")
def rows():
    data = [{**row, "__row__": str(i)} for i, row in enumerate(rows_of(32))]
    # A vocabulary with more than the rows use, so that there is something to prune, but not 30,000 pieces.
    tokenizer, _ = trim(load_tokenizer("minilm"), range(1000, 3000))
    task = make_task("sequence-classification", tokenizer, 16, LABELS)
    return task, Splits(data[:24], data[24:], [])


def stage_of(method, passes, objectives=()):
    return Stage(
        name="one",
        method=fields(method, joint_adapters() if method == "fusion" else ()),
        passes=[fields(one) for one in passes],
        objectives=[fields(one) for one in objectives],
    )


def trained(stage, rows, model=None, steps=4, dtype=None):
    """Prepare, train a few steps, under autocast to `dtype`, settle; validation logits before and after settling."""
    task, splits = rows
    model = model or tiny(vocab_size=len(task.tokenizer), num_labels=2)
    data = FeedRows(Feed(task.settings, "", DataConfig(train="none")), task, splits)
    context = Context(
        stage.transforms, load_teacher=lambda name: tiny(vocab_size=30522, num_labels=2), data=data.data()
    )
    for transform in stage.transforms:
        transform.prepare(model, context)
    batches = context.data.batches(24, 8, 0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        fit(model, stage.transforms, batches, steps, 1e-3, context)
    before = model_logits(model, data.task, data.validation)
    for transform in stage.transforms:
        transform.finalize(model)
    return model, data, before, model_logits(model, data.task, data.validation)


def close(a, b, limit=1e-4):
    """Rounding only; one flipped int8 rounding would be a few per cent of the spread."""
    spread = np.concatenate(a).std()
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True)) <= limit * spread


def refused(method, passes):
    """The stage, or None where the recipe is refused with a reason that names one of its entries."""
    try:
        return stage_of(method, passes)
    except ValueError as error:
        reason = str(error)
        assert any(f"'{name}'" in reason or f" {name}" in reason for name in (method, *passes)), reason
        assert len(reason) > 40
        return None


def method_for(*passes):
    """NF4 stores weights that nothing trains."""
    return HARD_METHOD if "nf4" in passes else "full"


BESIDE = list(itertools.product(METHODS, PASSES))
PAIRS = list(itertools.combinations(PASSES, 2))


def test_every_pair_is_a_recipe_or_refused_with_a_reason():
    beside = {(method, one): refused(method, [one]) for method, one in BESIDE}
    for stage in filter(None, beside.values()):
        orders = [one.order for one in stage.transforms]
        assert orders == sorted(orders)
    # Nothing is refused by everything, and no order of two passes changes whether they may be together.
    assert {method for (method, _), stage in beside.items() if stage} == set(METHODS)
    assert {one for (_, one), stage in beside.items() if stage} == set(PASSES)
    for pair in PAIRS:
        both = [refused(method_for(*pair), names) for names in (pair, pair[::-1])]
        assert (both[0] is None) == (both[1] is None), pair
        assert both[0] is None or set(both[0].transforms) == set(both[1].transforms)


def check_run(stage, rows, folder):
    """Settling moves no logit, and what is saved comes back to the bit."""
    model, data, before, after = trained(stage, rows)
    assert close(before, after), "settling changed the logits"
    assert all(np.isfinite(row).all() for row in after)
    save_compressed(model, data.task.tokenizer, folder / "model", {})
    loaded = load_compressed(folder / "model")
    assert count(loaded)["nonzero"] == count(model)["nonzero"], "saving revived or lost weights"
    assert all(
        np.array_equal(a, b) for a, b in zip(after, model_logits(loaded, data.task, data.validation), strict=True)
    )


@pytest.mark.dear
@pytest.mark.parametrize("method", METHODS)
def test_every_method_beside_the_hardest_passes(method, rows, tmp_path):
    check_run(next(filter(None, (refused(method, passes) for passes in HARD_PASSES))), rows, tmp_path)


@pytest.mark.dear
@pytest.mark.parametrize("one", PASSES)
def test_every_pass_beside_the_hardest_method(one, rows, tmp_path):
    check_run(stage_of(HARD_METHOD, [one]), rows, tmp_path)


@pytest.mark.parametrize(("method", "one"), drawn(8, BESIDE))
def test_a_method_beside_a_pass(method, one, rows, tmp_path):
    if stage := refused(method, [one]):
        check_run(stage, rows, tmp_path)


def kinds(pair):
    """When two passes act: what removes parts, stores, gates weights or parts, quantises."""
    return frozenset(PASSES[one].order for one in pair)


# Of every two kinds of pass one pair that may be together.
ALLOWED = sorted((pair for pair in PAIRS if refused(method_for(*pair), pair)), key=rank)
KINDS = list({kinds(pair): pair for pair in ALLOWED}.values())


@pytest.mark.parametrize(("one", "other"), drawn(0, ALLOWED, KINDS))
def test_two_passes(one, other, rows):
    _, _, before, after = trained(stage_of(method_for(one, other), [one, other]), rows, steps=3)
    assert close(before, after), "settling changed the logits"


def exported(model, data, folder):
    """Logits of the exported file."""
    batch = data.task.collate([{k: v for k, v in f.items() if k != "labels"} for f in data.validation[:2]])
    save(to_graph(fold(model), batch), folder / "model.onnx")
    return session_logits(open_session(folder / "model.onnx", 1), data.task, data.validation, 1)


SETS = {
    "+".join([method, *passes]): (method, passes, objectives)
    for method, passes, objectives in (
        ("full", ["vocabulary", "structured", "int8"], ["distill"]),
        ("adapter", ["nf4", "movement", "int8"], []),
        ("adapter", ["structured", "int8"], []),
        ("full", ["depth", "ziplm", "int4"], []),
        ("full", ["vocabulary", "movement", "structured", "int8"], ["distill"]),
    )
}


@pytest.mark.dear
@pytest.mark.parametrize("name", drawn(1, SETS, ("full+vocabulary+structured+int8",)))
def test_together_and_exported(name, rows, tmp_path):
    method, passes, objectives = SETS[name]
    orders = itertools.islice(itertools.permutations(passes), 2)
    results = [trained(stage_of(method, order, objectives), rows) for order in orders]
    for _, _, before, after in results:
        assert close(before, after)
    # The order in the recipe does not matter: each pass knows when it acts.
    assert all(np.array_equal(a, b) for a, b in zip(results[0][3], results[1][3], strict=True))
    model, data, _, after = results[0]
    got = exported(model, data, tmp_path)
    assert [row.argmax() for row in got] == [row.argmax() for row in after]
    assert close(after, got, 0.1)


@pytest.mark.dear
def test_a_compressed_model_can_be_pruned_further(rows, tmp_path):
    model, data, _, _ = trained(stage_of("full", ["vocabulary", "structured", "int8"]), rows)
    save_compressed(model, data.task.tokenizer, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    before = [(layer.heads, layer.ffn) for layer in anatomy(loaded).layers]
    again = (data.task, rows[1])
    smaller, data, settled, after = trained(stage_of("full", ["structured"]), again, loaded)
    assert close(settled, after)
    assert all(
        layer.heads <= h and layer.ffn < f for layer, (h, f) in zip(anatomy(smaller).layers, before, strict=True)
    )
    # It is still int8: the ranges of the first run are in force.
    assert [row.argmax() for row in exported(smaller, data, tmp_path)] == [row.argmax() for row in after]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_beside_the_hardest_passes(name, rows):
    _, _, before, after = trained(stage_of("full", HARD_PASSES[0], [name]), rows)
    assert close(before, after), "settling changed the logits"


def test_weights_that_went_do_not_come_back(rows):
    model = trained(stage_of("full", ["structured", "int8"]), rows)[0]
    deployed = fold(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            got = deployed.get_submodule(path).weight
            rows_first = got.t() if got.dtype == torch.int8 else got
            assert rows_first.shape == module.weight.shape
            assert torch.count_nonzero(rows_first[module.weight == 0]) == 0
