"""One door to folders of ours: whatever was changed after it was written is named, on every way in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.saved.folders import read_manifest
from compressft.model.saved.manifest import compare_labels, sealed
from compressft.run.evaluate import evaluate
from compressft.transform import Context
from compressft.utils.files import file_hash
from tests.tiny import tiny
from tests.tiny_folder import rows_of, write_jsonl

NAMED = {"num_labels": 2, "id2label": {0: "even", 1: "odd"}, "label2id": {"even": 0, "odd": 1}}
INFO = {"task": "sequence-classification", "labels": ["even", "odd"], "max_length": 8, "columns": {}, "model": "./base"}
OPENERS = {"model": (load_compressed, load_model), "delta": (load_delta,)}


@pytest.fixture
def written(tmp_path):
    save_compressed(tiny(**NAMED), None, tmp_path / "model", INFO)
    save_delta(tiny(**NAMED), None, {}, tmp_path / "delta", INFO)
    return tmp_path


@pytest.mark.parametrize("kind", OPENERS)
def test_every_file_is_compared_by_every_way_in(written, kind):
    folder = written / kind
    write_jsonl(written / "rows.jsonl", rows_of())
    for path in sorted(p for p in folder.iterdir() if p.name != "compressft.json"):
        raw = path.read_bytes()
        for changed in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[: len(raw) // 2], b""):
            path.write_bytes(changed)
            for opener in (*OPENERS[kind], lambda f: evaluate(f, written / "rows.jsonl"), read_manifest):
                with pytest.raises(UserError, match=rf"{path.name}: its hash is not the recorded one"):
                    opener(str(folder))
        path.write_bytes(raw)
    read_manifest(folder)


@pytest.mark.parametrize("kind", OPENERS)
def test_the_manifest_is_protected_too(written, kind):
    path = written / kind / "compressft.json"
    values = json.loads(path.read_text())
    for changes in ({"labels": ["odd", "even"]}, {"max_length": 9}, {"task": "regression"}, {"extra": 1}):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(UserError, match="was changed after it was written"):
            read_manifest(written / kind)
    # Written again by somebody who knows how: the other file still says otherwise.
    del values["hash"]
    path.write_text(json.dumps(sealed({**values, "labels": ["odd", "even"]})))
    with pytest.raises(UserError, match="label 0 is 'odd' here and 'even' in the configuration next to it"):
        read_manifest(written / kind)
    path.write_text(json.dumps(values))
    read_manifest(written / kind)


def test_labels_that_only_the_library_named_say_nothing(tmp_path):
    entry = {"labels": ["even", "odd"]}
    compare_labels(entry, {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, tmp_path)
    compare_labels(entry, {}, tmp_path)
    compare_labels({}, {"id2label": {"0": "a"}}, tmp_path)
    with pytest.raises(UserError, match="label 2 is 'none' here and 'x'"):
        compare_labels(entry, {"id2label": {"0": "even", "1": "odd", "2": "x"}}, tmp_path)


def test_a_hash_is_of_the_file_as_it_is_now(tmp_path):
    path = tmp_path / "x"
    path.write_text("one")
    first = file_hash(path)
    assert file_hash(path) == first
    path.write_text("other")
    assert file_hash(path) != first
    shutil.copy(path, tmp_path / "y")
    assert file_hash(tmp_path / "y") == file_hash(path)


def forged(folder, tensors=None, **config):
    """What somebody wrote who knows how: other tensors or another configuration, with hashes that fit."""
    path, file = folder / "compressft.json", folder / "delta.safetensors"
    save_file({**load_file(file), **(tensors or {})}, file)
    entry = json.loads(path.read_text())
    del entry["hash"]
    entry["config"] |= config
    entry["files"]["delta.safetensors"] = file_hash(file)
    path.write_text(json.dumps(sealed(entry)))


WEIGHT = "bert.encoder.layer.0.output.dense.weight"
NOTHING = {f"{WEIGHT}#gaps": torch.zeros(0, dtype=torch.uint8), f"{WEIGHT}#values": torch.zeros(0)}
FORGED = {
    "four terabytes": (
        {"tensors": {**NOTHING, f"{WEIGHT}#shape": torch.tensor([10**6, 10**6])}},
        rf"delta.safetensors: tensor '{WEIGHT}': makes \(1000000, 1000000\), the model wants \(32, 64\)",
    ),
    "rows of nobody": (
        {"tensors": {"elsewhere#rows": torch.tensor([0])}},
        "delta.safetensors: tensor 'elsewhere': has no place in the model",
    ),
    "a vocabulary of a billion": (
        {"vocab_size": 10**9},
        r"compressft.json: config: 'bert.embeddings.word_embeddings.weight' would be \(1000000000, 32\), the base's is",
    ),
    "a billion labels": ({"num_labels": 10**9}, "compressft.json: config: num_labels is 1000000000, id2label has 2"),
    "wide layers": (
        {"intermediate_size": 10**8},
        r"compressft.json: config: '.*' would be .*100000000.*, the base's is",
    ),
    "many layers": ({"num_hidden_layers": 10**6}, "compressft.json: config: wants 1,000,000 layers, the base has 2"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_delta_allocates_nothing_that_its_base_does_not_bear_out(tmp_path, case):
    tiny(**NAMED).bert.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    save_delta(tiny(**NAMED), None, base_tensors(base), tmp_path / "delta", {**INFO, "model": base})
    load_delta(tmp_path / "delta")
    changes, said = FORGED[case]
    forged(tmp_path / "delta", **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_delta(tmp_path / "delta")
    assert "\n" not in str(caught.value)


HUGE = 10**10
LARGE = {
    "a wide module": {"modules": {"bert.encoder.layer.0.output.adapter": {"kind": "bottleneck", "size": HUGE}}},
    "wide layers": {"shapes": [{"heads": 4, "kv_heads": 4, "ffn": HUGE}] * 2},
}


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("kind", OPENERS)
def test_nothing_is_allocated_that_the_files_do_not_hold(tmp_path, kind, case):
    tiny(**NAMED).bert.save_pretrained(tmp_path / "base")
    base, folder = str(tmp_path / "base"), tmp_path / kind
    model = tiny(**NAMED)
    Adapter(size=4).prepare(model, Context())
    if kind == "model":
        save_compressed(model, None, folder, INFO)
    else:
        save_delta(model, None, base_tensors(base), folder, {**INFO, "model": base})
    path = folder / "compressft.json"
    entry = json.loads(path.read_text())
    del entry["hash"]
    if "modules" in LARGE[case]:
        name, fields = next((name, e) for name, e in entry["modules"].items() if e["kind"] == "bottleneck")
        entry["modules"][name] = {**fields, "size": HUGE}
    else:
        entry |= LARGE[case]
    path.write_text(json.dumps(sealed(entry)))
    with pytest.raises(UserError) as caught:
        OPENERS[kind][0](folder)
    said = str(caught.value).replace(",", "")
    assert "\n" not in said and (str(HUGE) in said or "are stored" in said)
