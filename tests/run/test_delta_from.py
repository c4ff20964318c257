"""A delta from an earlier stage's model: small next to it, the same model, and said where it would have been."""

import json
import shutil

import pytest
import torch

from compressft.errors import UserError
from compressft.model.saved.compressed import load_compressed
from compressft.model.saved.delta import load_delta
from compressft.model.saved.vectors import TaskVector
from compressft.recipe.recipe import parse_recipe
from compressft.run.flow import run
from tests.tiny import batch_for, logits
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

pytestmark = pytest.mark.dear

SHORT = {"max_steps": 2, "batch_size": 8, "save": "no", "learning_rate": 1e-3, "warmup": 0.0}
STAGES = [
    {"name": "teacher", "train": SHORT},
    {"name": "student", "method": {"type": "layers", "top": 1}, "train": SHORT},
]


def recipe_of(folder, **changes):
    base, data = save_tiny(folder / "base"), write_jsonl(folder / "rows.jsonl", rows_of())
    return document(base, data, stages=STAGES, export={"enabled": False}, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with the whole delta and with one from its teacher."""
    folder = tmp_path_factory.mktemp("delta")
    recipe = recipe_of(folder)
    for name in (None, "teacher"):
        run(parse_recipe({**recipe, "delta_from": name}, "tiny"), folder / str(name))
    return folder


def test_it_is_small_and_the_same_model(runs):
    sizes = [(runs / name / "delta" / "delta.safetensors").stat().st_size for name in ("None", "teacher")]
    assert sizes[1] < sizes[0] / 20
    for source in (None, str(runs / "teacher" / "stages" / "teacher")):
        loaded = load_delta(runs / "teacher" / "delta", source)
        want = load_compressed(runs / "teacher" / "model")
        assert torch.equal(logits(loaded, batch_for("bert")), logits(want, batch_for("bert")))


def test_the_report_says_what_could_be_left_out(runs):
    notes = [json.loads((runs / name / "report" / "report.json").read_text())["notes"] for name in ("None", "teacher")]
    assert [note for note in notes[0] if "`delta_from: teacher` keeps those alone" in note]
    assert not [note for note in notes[1] if "delta_from" in note]


def test_its_vector_is_the_last_stage_alone(runs):
    whole, own = (set(TaskVector.of_delta(runs / name / "delta").changes) for name in ("None", "teacher"))
    assert {name for name in own if ".layer.0." in name or "embeddings" in name} == set()
    # The head is no change where the pretrained model, which has none, is the base.
    assert any(".layer.1." in name for name in own) and own - {"classifier.weight", "classifier.bias"} < whole


def test_without_the_stage_it_says_what_it_needs(runs, tmp_path):
    moved = shutil.copytree(runs / "teacher" / "delta", tmp_path / "delta")
    with pytest.raises(UserError, match="goes on from the model of stage 'teacher'; give it as the base, or put it at"):
        load_delta(moved)
    other = str(runs / "teacher" / "stages" / "student")
    with pytest.raises(UserError, match="was made on another base"):
        load_delta(moved, other)


@pytest.mark.parametrize("name", ["student", "nobody", "../teacher"])
def test_only_an_earlier_stage(tmp_path, name):
    with pytest.raises(UserError, match=r"delta_from: .* is no earlier stage; name one of teacher"):
        parse_recipe(document("minilm", "rows.jsonl", stages=STAGES, delta_from=name), "tiny")
