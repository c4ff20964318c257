"""Benchmark cases: run once by the hash of what was asked, on top of the cases that they read."""

import io
import json

import pytest
from rich.console import Console

from benchmarks import cases as engine
from benchmarks.cases import Case, run_cases
from benchmarks.compression import cases
from compressft.recipe import parse_recipe
from tests.tiny_folder import rows_of, save_tiny, write_jsonl


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A dense case and a pruned one that starts from it, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSFT_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows_of(24))
    save_tiny(tmp_path / "base")

    def case(name, model, after=(), passes=(), keep=False):
        train = {"max_steps": 2, "batch_size": 4, "precision": "fp32"}
        recipe = {
            "name": name,
            "model": model,
            "data": {"train": "{data}/rows.jsonl", "max_length": 16},
            "stages": [{"name": "only", "passes": list(passes), "train": train}],
            "export": {"enabled": False},
        }
        return Case(name, "group", recipe, after, keep, {"kind": name})

    pruned = [{"type": "magnitude", "sparsity": 0.5, "start": 0.0}]
    return [case("dense", str(tmp_path / "base"), keep=True), case("pruned", "{dense}/model", ("dense",), pruned)]


def run(suite, path):
    out = io.StringIO()
    document = run_cases("tiny", suite, suite[1:], path, Console(file=out, width=200))
    return document, [line.split(":")[0] for line in out.getvalue().splitlines() if line.endswith(": running")]


def test_runs_what_is_missing_and_keeps_what_is_there(suite, tmp_path):
    path = tmp_path / "results.json"
    document, ran = run(suite, path)
    assert ran == ["dense", "pruned"]
    record = document["cases"]["pruned"]
    assert record["key"] == suite[1].key and record["kind"] == "pruned" and record["group"] == "group"
    assert 0 <= record["quality"]["torch"] <= 1
    assert record["parameters"]["nonzero"] < record["parameters"]["total"]
    assert json.loads(path.read_text()) == document
    assert suite[0].folder("tiny").is_dir() and not suite[1].folder("tiny").exists()
    assert run(suite, path) == (document, [])
    # Another recipe of the same name runs again, on the dense model that is still there.
    changed = Case("pruned", "group", {**suite[1].recipe, "description": "again"}, ("dense",))
    _, ran = run([suite[0], changed], path)
    assert ran == ["pruned"]


def test_missing_data_ends_with_one_line(suite, monkeypatch):
    monkeypatch.setenv("COMPRESSFT_DATA", "nowhere")
    with pytest.raises(SystemExit, match="nowhere: no such folder; set COMPRESSFT_DATA"):
        engine.data_folder()


def test_every_case_is_a_recipe_of_its_own():
    everything = cases()
    assert len({case.name for case in everything}) == len({case.key for case in everything}) == len(everything)
    names = {case.name for case in everything}
    for case in everything:
        assert parse_recipe(dict(case.recipe)).name == case.name
        assert set(case.after) <= names
