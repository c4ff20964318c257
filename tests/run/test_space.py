"""Free space: what is asked for is what is left to write."""

import json

import pytest

from compressft.errors import UserError
from compressft.model.saved.manifest import sealed
from compressft.recipe.recipe import parse_recipe
from compressft.run.folder import RunFolder
from compressft.run.space import shipping_bytes, training_bytes

MODEL = 1000


def recipe_of(passes=(), export=True, dense=True):
    stages = [{"name": "teacher"}] if dense else []
    stages.append({"name": "student", "passes": [*passes, {"type": "magnitude", "sparsity": 0.5}]})
    data = {"sample": "banking77"}
    return parse_recipe({"name": "r", "model": "minilm", "data": data, "stages": stages, "export": {"enabled": export}})


def fill(folder, size):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(size))


def test_training_wants_two_checkpoints_and_what_ships_less_what_is_there(tmp_path):
    assert training_bytes(tmp_path, MODEL) == 8 * MODEL
    fill(tmp_path / "checkpoints" / "step-3", 3 * MODEL)
    assert training_bytes(tmp_path, MODEL) == 5 * MODEL
    fill(tmp_path / "checkpoints" / "step-6", 9 * MODEL)
    assert training_bytes(tmp_path, MODEL) == 0


@pytest.mark.parametrize(
    ("settings", "there", "wanted"),
    [
        # model/ and delta/, of the shapes that are left.
        ({"export": False}, (), 400 + 400),
        ({"export": False}, ("model",), 400 + 400),
        ({"export": False}, ("model", "delta"), 400),
        # onnx/ too, and the base's file while it is measured.
        ({}, (), 400 + 400 + 400 + MODEL),
        ({"passes": ["int8"]}, (), 400 + 400 + 100 + MODEL),
        ({"passes": ["int8"]}, ("model", "delta", "onnx"), MODEL),
        # The base itself, where the run has no dense model.
        ({"dense": False}, (), 400 + 400 + 400 + 2 * MODEL),
    ],
)
def test_what_ships(tmp_path, settings, there, wanted):
    fill(tmp_path / "stages" / "student", 400)
    for name in there:
        fill(tmp_path / name, 1)
    assert shipping_bytes(tmp_path, recipe_of(**settings), MODEL) == wanted


def test_a_stage_that_is_trained_but_not_saved(tmp_path):
    assert shipping_bytes(tmp_path, recipe_of(export=False), MODEL) == 3 * MODEL


@pytest.fixture
def disk(monkeypatch):
    """Sets how much is free."""

    def free(size):
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": size}))

    return free


def finish(folder, stage):
    fill(folder.stage(stage), 400)
    entry = {"kind": "model", "architecture": "x", "shapes": [], "modules": {}, "files": {}, "stage": {}}
    (folder.stage(stage) / "compressft.json").write_text(json.dumps(sealed(entry)))


def test_the_check_knows_what_is_left(tmp_path, disk):
    with RunFolder(tmp_path, recipe_of(export=False), resume=False) as folder:
        finish(folder, "teacher")
        disk(8 * MODEL - 1)
        with pytest.raises(UserError, match="checkpoints need about"):
            folder.check_space(MODEL)
        written = folder.staging / "checkpoint-3"
        fill(written, 10)
        folder.publish(written, 3, {"stage": "student", "seconds": 1.0, "done": False}, 1)
        with pytest.raises(UserError, match="checkpoints need about"):
            disk(7 * MODEL)
            folder.check_space(MODEL)
        written = folder.staging / "checkpoint-6"
        fill(written, 10)
        folder.publish(written, 6, {"stage": "student", "seconds": 1.0, "done": True}, 1)
        disk(3 * MODEL)
        folder.check_space(MODEL)
        finish(folder, "student")
        disk(800)
        folder.check_space(MODEL)
        disk(799)
        with pytest.raises(UserError, match="what is left to write needs about"):
            folder.check_space(MODEL)
