"""The hub: a verified folder goes up with its card, and models and data sets come down at the revision that is named.

The client is huggingface_hub's own; the hub is a server on this machine (`tests/hub.py`).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.run.card import CARD, model_card
from compressft.run.flow import run
from compressft.run.push import Target, push
from compressft.utils.hub import hub_id, pinned
from tests.hub import Hub, serving
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

ROOT = Path(__file__).parents[2]
EXPORT = {"latency_rounds": 1, "latency_shapes": [[1, 8]]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny base and a finished run, `run/`; tests must not change it."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny(folder / "bert")
    train, test = (write_jsonl(folder / f"{name}.jsonl", rows_of(n)) for name, n in (("train", 40), ("test", 10)))
    stages = [{"name": "small", "passes": ["int8"], "train": {"max_steps": 2, "batch_size": 8}}]
    whole = document(folder / "bert", train, stages=stages, export=EXPORT)
    whole["data"]["test"] = str(test)
    run(parse_recipe(whole), folder / "run", console=Console(file=io.StringIO()))
    return folder


@pytest.fixture
def copy(place, tmp_path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


@pytest.fixture
def hub():
    with serving() as found:
        yield found


def compressft(hub: Hub, place: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command line, for which that hub is the only one; without a token unless one is given."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(place / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **variables}
    command = [sys.executable, "-m", "compressft", *map(str, arguments)]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


@pytest.mark.dear
def test_the_verified_folder_goes_up_with_its_card_and_nothing_else(place, copy, hub):
    (copy / "onnx" / "notes.txt").write_text("mine")
    done = compressft(hub, copy.parent, "push", "run", "me/tiny", HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    found = hub.files("models/me/tiny", "main")
    assert found is not None
    commit, files = found
    assert done.stdout.strip() == f"{hub.address}/me/tiny/commit/{commit}"
    assert set(files) == {p.name for p in (place / "run" / "onnx").iterdir()} and CARD in files
    assert files["model.onnx"] == (place / "run" / "onnx" / "model.onnx").read_bytes()
    report = json.loads((place / "run" / "report" / "report.json").read_text())
    card = ModelCard(files[CARD].decode())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", report["quality"]["onnx"])
    assert (result.dataset_name, result.dataset_split) == ("test.jsonl", "test")
    assert card.data.pipeline_tag == "text-classification" and {"compressft", "onnx", "int8"} <= set(card.data.tags)
    assert str(place) not in card.content and 'InferenceSession("./model.onnx"' in card.text


@pytest.mark.dear
def test_a_missing_token_and_a_hub_that_refuses_are_one_line(copy, hub):
    done = compressft(hub, copy.parent, "push", "run", "me/tiny")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN" in done.stderr
    assert not [one for one in hub.asked if not one.startswith("GET")]
    done = compressft(hub, copy.parent, "push", "run", "me/tiny", HF_TOKEN="hf_wrong")
    assert done.returncode == 2 and "'me/tiny' could not be uploaded to: " in done.stderr
    assert "Traceback" not in done.stderr and hub.files("models/me/tiny", "main") is None


@pytest.mark.dear
def test_runs_that_are_not_verified_do_not_go_up(copy):
    target = Target("me/tiny")
    with pytest.raises(UserError, match="is no folder that ships; allowed: onnx, model, delta"):
        push(copy, target, "checkpoints")
    report = copy / "report" / "report.json"
    whole = json.loads(report.read_text())
    report.write_text(json.dumps(whole | {"onnx_hash": "sha256:another"}))
    with pytest.raises(UserError, match=r"is of another ONNX file than .*export it again: compressft export"):
        push(copy, target)
    (copy / "onnx").rename(copy / "onnx.failed")
    for part in (None, "model", "delta"):
        with pytest.raises(UserError, match=r"has no verified ONNX file \(what failed is in onnx.failed/\)"):
            push(copy, target, part)
    (copy / "onnx.failed").rename(copy / "onnx")
    damaged = copy / "onnx" / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    report.write_text(json.dumps(whole))
    with pytest.raises(UserError, match=r"model.onnx: its hash is not the recorded one"):
        push(copy, target)


@pytest.mark.dear
def test_every_folder_that_ships_has_a_card_of_its_own(place):
    report = json.loads((place / "run" / "report" / "report.json").read_text())
    for part, loader in (("model", "load_compressed"), ("delta", "load_delta"), ("onnx", "InferenceSession")):
        card = ModelCard.load(place / "run" / part / CARD)
        value = report["quality"]["onnx" if part == "onnx" else "torch"]
        assert loader in card.text and card.data.eval_results[0].metric_value == value


def test_a_smoke_run_does_not_go_up(tmp_path):
    """Its limits do not apply, so nothing of it is verified."""
    recipe = parse_recipe(document("minilm", "x.jsonl", smoke=True))
    from compressft.run.push import _verified

    with pytest.raises(UserError, match=r"is a smoke run, whose file nobody verified; run the recipe without --smoke"):
        _verified(recipe, tmp_path, "onnx")


def test_a_card_says_what_the_hub_knows_of_model_and_data():
    whole = document("owner/base@v1", "x.jsonl") | {"data": {"dataset": "owner/rows@abc", "subset": "small"}}
    report = {"quality": {"metric": "accuracy", "split": "validation", "torch": 0.5, "onnx": None}}
    card = model_card(parse_recipe(whole), report, "model")
    assert card.data.base_model == "owner/base" and card.data.datasets == ["owner/rows"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.dataset_config, result.dataset_revision) == ("owner/rows", "small", "abc")
    assert model_card(parse_recipe(whole), report, "onnx").data.eval_results is None


# Revisions.


def test_a_revision_stands_behind_a_hub_id(tmp_path, monkeypatch):
    assert pinned("owner/name") == ("owner/name", None)
    assert pinned("owner/name@v1.0") == ("owner/name", "v1.0")
    assert pinned("owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    assert pinned("./a@b") == ("./a@b", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a@b").mkdir()
    assert pinned("a@b") == ("a@b", None)
    for name in ("owner/name@", "@v1"):
        with pytest.raises(UserError, match="write owner/name@revision"):
            pinned(name)
    assert hub_id("owner/name@v1") == "owner/name" and hub_id("minilm") is None and hub_id(str(tmp_path)) is None


def put(hub: Hub, repo: str, folder: Path, *names: str) -> str:
    return hub.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()}, *names)


@pytest.mark.dear
def test_a_run_takes_model_and_rows_at_their_revisions(tmp_path, hub):
    base = save_tiny(tmp_path / "base")
    commit = put(hub, "models/me/base", base, "v1")
    hub.commit("models/me/base", {"config.json": b"{}"}, "main")
    rows = [json.dumps(row) for row in rows_of(30)]
    for number, name in ((30, "main"), (20, "v1")):
        hub.commit("datasets/me/rows", {"train.jsonl": "\n".join(rows[:number]).encode()}, name)
    whole = document("me/base@v1", "", export={"enabled": False}) | {
        "data": {"dataset": "me/rows@v1", "max_length": 16}
    }
    (tmp_path / "r.yaml").write_text(parse_recipe(whole).to_yaml())
    done = compressft(hub, tmp_path, "run", "r.yaml", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert "tiny: 18 train, 2 validation" in done.stderr
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert report["model"] == "me/base@v1" and report["model_revision"] == commit
    identity = json.loads((tmp_path / "out" / "identity.json").read_text())
    assert identity["inputs"]["model"] == f"revision:{commit}"
    # The branch moves on: the run goes on with what it began with, or says that it cannot.
    put(hub, "models/me/base", save_tiny(tmp_path / "other", num_hidden_layers=1), "v1")
    done = compressft(hub, tmp_path, "run", "r.yaml", "--output", "out", "--resume")
    assert done.returncode == 2 and "'me/base@v1' (on the hub): has changed since the run began" in done.stderr
