"""Plan: what it predicts is what a built model has, and moves the right way with batch, method and teacher."""

from __future__ import annotations

import math

import pytest
import torch

from compressft.errors import UserError
from compressft.model.count import count
from compressft.model.load import load_empty, load_model
from compressft.recipe.program import parse_task
from compressft.recipe.recipe import load_recipe, parse_recipe
from compressft.run.plan.predict import Prediction, parse_bytes, plan
from compressft.transform import Context
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

ROWS = 45


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Builds a recipe of one stage on a tiny model."""
    folder = tmp_path_factory.mktemp("plan")
    model, data = save_tiny(folder / "model"), write_jsonl(folder / "rows.jsonl", rows_of(ROWS))
    held = write_jsonl(folder / "held.jsonl", rows_of(10))

    def recipe(*, family_folder=None, train=None, extra=(), **stage):
        chosen = document(family_folder or model, data)
        chosen["data"]["validation"] = str(held)
        chosen["stages"] = [*extra, {"name": "only", "train": {"epochs": 2, "batch_size": 8, **(train or {})}, **stage}]
        return parse_recipe(chosen)

    return recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        ("500MB", 500e6),
        ("500M", 500e6),
        ("1.5GB", 1.5e9),
        (" 2 KiB ", 2048),
        ("64B", 64),
        ("1000", 1000),
        ("0.5MiB", 2**19),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["nonsense", "", "8 elephants", "-1GiB", "1.2.3GiB", ".", "GiB", "8gib", "1e9", "8TB"])
def test_size_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="wants a size such as 8GiB or 500MB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


METHODS = {
    "full": "full",
    "frozen embeddings": {"type": "full", "freeze_embeddings": True},
    "probe": "probe",
    "layers": {"type": "layers", "top": 1},
    "houlsby": {"type": "adapter", "size": 8},
    "pfeiffer": {"type": "adapter", "placement": "pfeiffer"},
}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_those_of_the_built_model(recipe, method):
    chosen = recipe(method=METHODS[method])
    (stage,) = plan(chosen).stages
    model = load_model(chosen.model, "AutoModelForSequenceClassification", num_labels=2)
    chosen.stages[0].method.prepare(model, Context())
    assert stage["trainable"] == count(model)["trainable"]
    assert stage["bytes"]["weights"] == 4 * count(model)["total"]
    assert stage["bytes"]["gradients"] == 4 * stage["trainable"]
    assert stage["bytes"]["optimiser"] == 8 * stage["trainable"]


def test_what_wants_to_see_rows_is_planned_without(recipe):
    plain, standardised = (recipe(method={"type": "probe", "standardise": on}) for on in (False, True))
    assert plan(standardised).stages[0]["trainable"] == plan(plain).stages[0]["trainable"]


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "qwen3"])
def test_other_families_are_planned_too(recipe, tmp_path, family):
    chosen = recipe(family_folder=save_tiny(tmp_path, family, pad_token_id=0))
    (stage,) = plan(chosen).stages
    model = load_model(str(tmp_path), "AutoModelForSequenceClassification", num_labels=2)
    assert stage["trainable"] == count(model)["total"]
    assert stage["bytes"]["activations"] > 0


def test_nothing_but_shapes_is_loaded(recipe):
    model = load_empty(recipe().model, "AutoModelForSequenceClassification", num_labels=2)
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({}, 2 * math.ceil(ROWS / 8)),
        ({"epochs": 0.5}, 3),
        ({"gradient_accumulation": 2}, 2 * math.ceil(ROWS / 16)),
        ({"batch_size": 64}, 2),
        ({"max_steps": 7}, 7),
    ],
)
def test_steps(recipe, train, steps):
    assert plan(recipe(train=train)).stages[0]["steps"] == steps


def test_predictions_move_the_right_way(recipe):
    def stage(train=None, **changes):
        # An evaluation of more rows than a step has would take more than the tiny model's training.
        return plan(recipe(train={"eval_batch_size": 1, **(train or {})}, **changes)).stages[-1]

    plain = stage()
    double = stage(train={"batch_size": 16})
    assert double["bytes"]["activations"] == 2 * plain["bytes"]["activations"]
    assert stage(train={"gradient_checkpointing": True})["bytes"]["activations"] < plain["bytes"]["activations"]
    assert stage(passes=["int8"])["bytes"]["activations"] > plain["bytes"]["activations"]
    assert stage(train={"optimizer": "adamw_8bit"})["bytes"]["optimiser"] < plain["bytes"]["optimiser"]
    probe = stage(method="probe")
    assert probe["bytes"]["activations"] < plain["bytes"]["activations"]
    assert sum(probe["bytes"].values()) < sum(plain["bytes"].values())
    distilled = stage(extra=[{"name": "teacher"}], objectives=[{"type": "distill", "teacher": "teacher"}])
    assert distilled["bytes"]["weights"] == 2 * plain["bytes"]["weights"]
    assert distilled["flops"] > plain["flops"]
    alone = stage(objectives=[{"type": "distill", "teacher": "self"}])
    assert alone["bytes"]["weights"] == plain["bytes"]["weights"]
    longer = stage(train={"epochs": 4})
    assert longer["flops"] == pytest.approx(2 * plain["flops"])
    assert 0 < plain["seconds"] < math.inf


@pytest.mark.parametrize(("batch", "evaluated", "rows"), [(8, 4, 8), (8, 64, 64)])
def test_a_vocabularys_logits_are_counted(recipe, tmp_path, batch, evaluated, rows):
    """Of the batch that holds more of them: training's or evaluation's."""
    folder = save_tiny(tmp_path, "gpt2", pad_token_id=0, n_positions=16)
    train = {"batch_size": batch, "eval_batch_size": evaluated}
    chosen = recipe(family_folder=folder, train=train)
    model = load_model(str(folder), "AutoModelForCausalLM")
    assert plan(chosen).stages[0]["bytes"]["logits"] == 0
    (stage,) = plan(chosen.model_copy(update={"task": parse_task("causal-lm")})).stages
    assert stage["bytes"]["logits"] == 3 * 4 * rows * chosen.data.max_length * model.config.vocab_size


def test_peak_is_the_largest_stage_and_the_budget_is_judged(recipe):
    chosen = recipe(extra=[{"name": "big", "train": {"batch_size": 16384}}], method="probe")
    prediction = plan(chosen)
    assert prediction.peak == sum(prediction.stages[0]["bytes"].values()) > sum(prediction.stages[1]["bytes"].values())
    assert [line.split(":")[0] for line in prediction.lines()] == ["big", "only", "saving", "export", "peak"]
    assert all("\n" not in line for line in prediction.lines())
    exact = str(prediction.peak)
    assert Prediction(prediction.stages, parse_bytes(exact)).lines()[-1].endswith(": fits")
    assert "does not fit; lower train.batch_size" in Prediction(prediction.stages, prediction.peak - 1).lines()[-1]
    # Export follows training, and may take more.
    small = plan(recipe())
    assert small.peak == sum(small.after["export"].values()) > sum(small.stages[0]["bytes"].values())
    assert "training does; lower export.batch" in Prediction(small.stages, small.peak - 1, small.after).lines()[-1]
    assert plan(chosen, "1TB".replace("T", "000G")).lines()[-1].endswith(": fits")
    assert "does not fit" in plan(chosen, "1MiB").lines()[-1]


def test_shipped_recipe_trains_all_of_minilm():
    prediction = plan(load_recipe("banking77-edge-full", ["data.limit=80"]))
    assert [stage["name"] for stage in prediction.stages] == ["teacher", "student"]
    # MiniLM-L6 has 22.7 million parameters, as its own card says, and a head for the labels that occur.
    assert prediction.stages[0]["trainable"] == pytest.approx(22.7e6, rel=0.01)


def test_model_that_cannot_be_built_is_refused(recipe, tmp_path):
    folder = save_tiny(tmp_path)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UserError) as caught:
        plan(recipe(family_folder=folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
