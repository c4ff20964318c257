"""The joint run: every pass beside every method, present or added later, and sensible sets of passes at once."""

import itertools

import numpy as np
import pytest
import torch

from compressft.anatomy import anatomy
from compressft.checkpoint import load_compressed, save_compressed
from compressft.data import Splits, make_task
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.export.session import open_session, session_logits
from compressft.export.verify import model_logits
from compressft.methods import METHODS
from compressft.model import count, load_tokenizer
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.passes.trim import trim
from compressft.recipe import Stage
from compressft.stages import StageRows
from compressft.transform import Context
from tests.tiny import fit, tiny
from tests.tiny_adapters import joint_adapters
from tests.tiny_folder import rows_of

# Settings for the tiny model, where the defaults would not do anything to it (or a field has no default).
METHOD_FIELDS = {
    "layers": {"top": 1},
    "adapter": {"size": 4},
    "probe": {"cache": False},
    "prefix": {"length": 3, "hidden": 8},
    "diff": {"density": 0.1, "end": 0.5},
    "task_vector": {"encoding": "int8"},
    "head_gates": {"decide": "importance", "heads": 0.5, "start": 0.0, "end": 0.5},
    "fusion": lambda: {"adapters": joint_adapters()},
    "scalar_mix": {"normalise": "row"},
    "lsh_attention": {"chunk": 4},
}
PASS_FIELDS = {
    "structured": {"heads": 0.5, "ffn": 0.5, "align": 8, "floor_ffn": 8, "start": 0.0, "end": 0.5},
    "magnitude": {"sparsity": 0.5, "start": 0.0, "end": 0.5},
    "movement": {"sparsity": 0.5, "start": 0.0, "end": 0.5},
    "l0": {"penalty": 20.0, "learning_rate": 1.0, "end": 0.5},
    "block": {"sparsity": 0.5, "tile": 8, "start": 0.0, "end": 0.5},
    "n_m": {"start": 0.0, "end": 0.5},
    "wanda": {"sparsity": 0.5},
    "sparsegpt": {"pattern": "2:4"},
    "ziplm": {"target": {"sparsity": 0.4}, "align": 8, "floor_ffn": 8},
    "depth": {"keep": [1]},
    "int4": {"embeddings": "int4"},
}
OBJECTIVE_FIELDS = {"distill": {"teacher": "self", "hidden": 1.0}}
LABELS = ("even", "odd")


@pytest.fixture(scope="module")
def rows():
    data = [{**row, "__row__": str(i)} for i, row in enumerate(rows_of(32))]
    # A vocabulary with more than the rows use, so that there is something to prune, but not 30,000 pieces.
    tokenizer, _ = trim(load_tokenizer("minilm"), range(1000, 3000))
    task = make_task("sequence-classification", tokenizer, 16, LABELS)
    return task, Splits(data[:24], data[24:], [])


def stage_of(method, passes, objectives=()):
    fields = METHOD_FIELDS.get(method, {})
    return Stage(
        name="one",
        method={"type": method, **(fields() if callable(fields) else fields)},
        passes=[{"type": one, **PASS_FIELDS.get(one, {})} for one in passes],
        objectives=[{"type": one, **OBJECTIVE_FIELDS.get(one, {})} for one in objectives],
    )


def trained(stage, rows, model=None, steps=4):
    """Prepare, train a few steps, settle; logits of the validation rows before and after settling."""
    task, splits = rows
    model = model or tiny(vocab_size=len(task.tokenizer), num_labels=2)
    data = StageRows(task, splits)
    context = Context(
        stage.transforms, load_teacher=lambda name: tiny(vocab_size=30522, num_labels=2), data=data.data()
    )
    for transform in stage.transforms:
        transform.prepare(model, context)
    batches = context.data.batches(24, 8, 0)
    fit(model, stage.transforms, batches, steps, 1e-3, context)
    before = model_logits(model, data.task, data.validation)
    for transform in stage.transforms:
        transform.finalize(model)
    return model, data, before, model_logits(model, data.task, data.validation)


def close(a, b, limit=1e-4):
    """Rounding only; one flipped int8 rounding would be a few per cent of the spread."""
    spread = np.concatenate(a).std()
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True)) <= limit * spread


def refused(build, *names):
    """The stage, or None where the recipe is refused with a reason that names one of the two."""
    try:
        return build()
    except ValueError as error:
        reason = str(error)
        assert any(f"'{name}'" in reason or f" {name}" in reason for name in names), reason
        assert len(reason) > 40
        return None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("one", PASSES)
def test_every_pass_beside_every_method(method, one, rows, tmp_path):
    stage = refused(lambda: stage_of(method, [one]), method, one)
    if stage is None:
        return
    model, data, before, after = trained(stage, rows)
    assert close(before, after), "settling changed the logits"
    assert all(np.isfinite(row).all() for row in after)
    save_compressed(model, data.task.tokenizer, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert count(loaded)["nonzero"] == count(model)["nonzero"], "saving revived or lost weights"
    assert all(
        np.array_equal(a, b) for a, b in zip(after, model_logits(loaded, data.task, data.validation), strict=True)
    )


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(PASSES, 2)))
def test_every_pair_of_passes(one, other, rows):
    method = "adapter" if "nf4" in (one, other) else "full"
    stage = refused(lambda: stage_of(method, [one, other]), one, other)
    if stage is not None:
        _, _, before, after = trained(stage, rows, steps=3)
        assert close(before, after), "settling changed the logits"


def exported(model, data, folder):
    """Logits of the exported file."""
    batch = data.task.collate([{k: v for k, v in f.items() if k != "labels"} for f in data.validation[:2]])
    save(to_graph(fold(model), batch), folder / "model.onnx")
    return session_logits(open_session(folder / "model.onnx", 1), data.task, data.validation, 1)


SETS = [
    ("full", ["vocabulary", "structured", "int8"], ["distill"]),
    ("adapter", ["nf4", "movement", "int8"], []),
    ("adapter", ["structured", "int8"], []),
    ("full", ["depth", "ziplm", "int4"], []),
    ("full", ["vocabulary", "movement", "structured", "int8"], ["distill"]),
]


@pytest.mark.parametrize(("method", "passes", "objectives"), SETS, ids=["+".join([m, *p]) for m, p, _ in SETS])
def test_together_and_exported(method, passes, objectives, rows, tmp_path):
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


def test_every_objective_has_settings():
    for name in OBJECTIVES:
        assert stage_of("full", [], [name]).objectives


def test_weights_that_went_do_not_come_back(rows):
    model = trained(stage_of("full", ["structured", "int8"]), rows)[0]
    deployed = fold(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            got = deployed.get_submodule(path).weight
            rows_first = got.t() if got.dtype == torch.int8 else got
            assert rows_first.shape == module.weight.shape
            assert torch.count_nonzero(rows_first[module.weight == 0]) == 0
