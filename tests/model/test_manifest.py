"""Manifests that lack a field or say nonsense: one line that names the file and the field."""

import json

import pytest

from compressft.adapters.convert import convert
from compressft.errors import UserError
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import load_delta, save_delta
from compressft.model.saved.folders import read_manifest
from compressft.model.saved.manifest import REQUIRED
from compressft.run.evaluate import evaluate
from tests.tiny import tiny

INFO = {"task": "sequence-classification", "labels": ["a", "b"], "max_length": 8, "columns": {}, "model": "./base"}
LOADERS = {"model": load_compressed, "delta": load_delta}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A `model/` and a `delta/` of an untouched tiny BERT."""
    root, model = tmp_path_factory.mktemp("manifests"), tiny()
    save_compressed(model, None, root / "model", INFO)
    save_delta(model, None, {}, root / "delta", INFO)
    return root


@pytest.fixture
def changed(written, tmp_path):
    """A copy of one of them with other fields; None removes one."""

    def changed(which, /, **changes):
        for path in (written / which).iterdir():
            (tmp_path / path.name).symlink_to(path)
        file = tmp_path / "compressft.json"
        values = {**json.loads(file.read_text()), "hash": None, **changes}
        file.unlink()
        file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
        return tmp_path

    return changed


def said(do, *arguments):
    with pytest.raises(UserError) as caught:
        do(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind in LOADERS for field in ("kind", *REQUIRED[kind])])
def test_missing_field(changed, kind, field):
    folder = changed(kind, **{field: None})
    wanted = f"{folder / 'compressft.json'}: field '{field}' is missing"
    assert said(LOADERS[kind], folder).startswith(wanted)
    assert said(evaluate, folder, "rows.jsonl").startswith(wanted)
    assert said(convert, folder, folder / "out").startswith(wanted)


@pytest.mark.parametrize("field", ["labels", "max_length", "columns"])
def test_evaluate_wants_what_a_task_needs(changed, field):
    assert f"field '{field}' is missing" in said(evaluate, changed("model", **{field: None}), "rows.jsonl")


def test_unknown_task(changed):
    folder = changed("model", task="sequence-classifaction")
    assert "(did you mean 'sequence-classification'?)" in said(evaluate, folder, "rows.jsonl")


SHAPE = {"heads": 4, "kv_heads": 4, "ffn": 64}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"kind": "modle"}, "kind 'modle' is not known"),
        ({"kind": ["model"]}, "is not known"),
        ({"kind": "onnx", "modules": []}, "is of a folder of kind 'onnx'"),
        ({"format": 2}, "format 2; this compressft reads 1"),
        ({"files": []}, "field 'files' wants an object of hashes"),
        ({"shapes": 3}, "field 'shapes' wants a list of layers"),
        ({"shapes": [{"heads": 4}]}, "field 'shapes' wants a list of layers"),
        ({"shapes": [SHAPE]}, "shapes of 1 layers, the model has 2"),
        ({"shapes": [SHAPE, {**SHAPE, "ffn": 65}]}, "shapes.1.ffn is 65, the model has 64"),
        ({"width": 33}, "width is 33, the model has 32"),
        ({"modules": []}, "field 'modules' wants an object of modules"),
        ({"modules": {"classifier": {}}}, "field 'modules' wants an object of modules"),
        ({"modules": {"classifier": {"kind": "newer"}}}, "compressft.json: classifier: unknown kind 'newer'"),
        ({"modules": {"nowhere.x": {"kind": "linear"}}}, "compressft.json: nowhere.x: a 'linear' of these fields"),
        ({"modules": {"classifier": {"kind": "bottleneck", "colour": 1}}}, "does not fit there"),
        ({"architecture": "BertForNothing"}, "'BertForNothing' is no model class"),
        ({"architecture": "pipeline"}, "'pipeline' is no model class"),
        ({"architecture": "GPT2LMHeadModel"}, "is of family 'gpt2', the configuration of 'bert'"),
        ({"labels": "ab"}, "field 'labels' wants a list of strings"),
    ],
)
def test_nonsense(changed, changes, part):
    assert part in said(load_compressed, changed("model", **changes))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": None}, "field 'model' is missing"),
        ({"config": {}}, "field 'config' wants an object with model_type"),
        ({"architecture": "BertForNothing"}, "is no model class"),
    ],
)
def test_nonsense_in_a_delta(changed, changes, part):
    assert part in said(load_delta, changed("delta", **changes))


def test_a_list(changed):
    folder = changed("model")
    (folder / "compressft.json").write_text("[]")
    for do in (read_manifest, load_compressed, load_delta):
        assert "wants a JSON object, holds list" in said(do, folder)


def test_a_file_that_the_manifest_does_not_name(changed):
    folder = changed("model", files={})
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: is missing" in said(load_compressed, folder)


def test_older_folders_load(changed):
    """Nothing of this is needed to build the model."""
    names = ("format", "width", "task", "labels", "max_length", "columns", "model")
    load_compressed(changed("model", **dict.fromkeys(names)))
