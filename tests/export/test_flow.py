"""Exporting a trained run: other settings, tolerances that are missed, and a run without an ONNX file."""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
import yaml

from compressft import cli
from compressft.evaluation.logits import scored
from compressft.recipe.recipe import parse_recipe
from compressft.run.evaluate import evaluate
from compressft.run.flow import run
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

pytestmark = pytest.mark.dear


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of a tiny model, compressed in its only stage, not exported yet."""
    folder = tmp_path_factory.mktemp("flow")
    data = write_jsonl(folder / "rows.jsonl", rows_of(40))
    stage = {
        "name": "only",
        "passes": [{"type": "structured", "ffn": 0.5, "align": 8, "floor_ffn": 8, "end": 0.5}, {"type": "int8"}],
        "train": {"max_steps": 4, "batch_size": 8, "save": "no", "precision": "fp32"},
    }
    export = {"enabled": False, "latency_rounds": 1, "latency_shapes": [[2, 8]]}
    recipe = document(save_tiny(folder / "base"), data, stages=[stage], export=export)
    run(parse_recipe(recipe), folder / "run")
    return folder / "run"


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", copy_function=os.link))


@pytest.fixture
def export(monkeypatch, capsys):
    """`compressft export` in this process: (exit code, standard error)."""

    def call(folder: Path, *overrides: str) -> tuple[int, str]:
        sets = [word for override in overrides for word in ("--set", f"export.{override}")]
        monkeypatch.setattr(sys, "argv", ["compressft", "export", str(folder), *sets])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    return call


def read_report(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text())


def test_run_without_export(trained):
    report = read_report(trained)
    assert not (trained / "onnx").exists()
    assert report["quality"]["onnx"] is None and report["quality"]["torch"] is not None
    assert report["parity"] is None and report["latency_ms"] == []
    # Without a test split the figures are validation's; without a dense stage there is no baseline.
    assert report["quality"]["split"] == "validation" and report["quality"]["baseline"] is None


@pytest.mark.parametrize("stages", [1, 2])
def test_a_baseline_that_ships_is_evaluated_once(stages, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(40))
    train = {"max_steps": 2, "batch_size": 8, "save": "no", "precision": "fp32", "learning_rate": 1e-2}
    plans = [{"name": "dense", "train": train}, {"name": "small", "passes": [{"type": "int8"}], "train": train}]
    recipe = document(save_tiny(tmp_path / "base"), data, stages=plans[:stages], export={"enabled": False})
    recipe["data"]["test"] = str(write_jsonl(tmp_path / "test.jsonl", rows_of(30)))
    evaluated = []

    def counted(run, task, features, batch=32):
        evaluated.append(len(features))
        return scored(run, task, features, batch)

    monkeypatch.setattr("compressft.export.flow.scored", counted)
    quality = run(parse_recipe(recipe), tmp_path / "run")["quality"]
    assert len(evaluated) == stages
    dense, ships = (tmp_path / "run" / name for name in ("stages/dense", "model"))
    for folder, name in ((dense, "baseline"), (ships, "torch")):
        assert quality[name] == evaluate(folder, recipe["data"]["test"])["accuracy"]


def record_no_recipe(run: Path) -> None:
    """As earlier versions saved a model: which recipe was trained is not said."""
    path = run / "model" / "compressft.json"
    entry = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("recipe_hash", "hash")}
    path.unlink()
    path.write_text(json.dumps(entry))


@pytest.mark.full
def test_export_of_a_trained_run(copy, trained, export):
    # As if it had been asked for more speed than there is.
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    target = {"latency_ms": 1.0e-6, "batch": 2, "length": 16}
    recipe["stages"][0]["passes"][0] = {"type": "ziplm", "target": target}
    (copy / "recipe.yaml").unlink()
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record_no_recipe(copy)
    asked = (copy / "recipe.yaml").read_bytes()

    code, stderr = export(copy, "enabled=true", "attention=fused")
    assert code == 0, stderr
    found = Counter(node.op_type for node in onnx.load(str(copy / "onnx" / "model.onnx")).graph.node)
    assert (found["MultiHeadAttention"], found["QAttention"], found["SkipLayerNormalization"]) == (2, 0, 0)
    before, after = read_report(trained), read_report(copy)
    for key in ("parameters", "training", "stages", "shapes"):
        assert after[key] == before[key], key
    assert after["quality"]["torch"] == before["quality"]["torch"] == after["quality"]["onnx"]
    assert {(row["batch"], row["length"]) for row in after["latency_ms"]} == {(2, 8), (2, 16)}
    assert len(after["latency_ms"]) == 6
    assert after["portable"] and after["pair_sums"]["largest"] <= after["pair_sums"]["limit"]
    (note,) = after["notes"]
    assert note.startswith("target.latency_ms: 1e-06 was asked for at 2x16, ")
    # The uncompressed model is measured although the run has none.
    assert after["size_bytes"]["base_onnx"] > after["size_bytes"]["onnx"] > 0
    assert (copy / "recipe.yaml").read_bytes() == asked
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (copy / name).read_bytes() == (trained / name).read_bytes()
    assert not list(copy.glob("tmp*"))


@pytest.mark.full
def test_a_run_of_a_version_with_one_grid_is_named(copy, export, tmp_path):
    """Its weights go on meaning what was trained; the outcome is the same on processors that saturate."""
    manifest = json.loads((copy / "model" / "compressft.json").read_text())
    del manifest["hash"]
    entries = [one for one in manifest["modules"].values() if one["kind"] == "int8"]
    assert entries and {one.pop("target") for one in entries} == {"any"}
    (copy / "model" / "compressft.json").unlink()
    (copy / "model" / "compressft.json").write_text(json.dumps(manifest))
    rows = write_jsonl(tmp_path / "rows.jsonl", rows_of(30))
    scored = evaluate(copy, rows)
    assert not scored["portable"] and "AVX2" in scored["note"]
    code, stderr = export(copy, "enabled=true")
    assert code == 0, stderr
    report = read_report(copy)
    assert report["portable"] is False and report["pair_sums"]["beyond"]
    assert [note for note in report["notes"] if note.startswith("not portable")]
    assert [row["kernels"] for row in report["verification"]] == ["exact"] * 2 + ["default"] * 2
    assert "without VNNI" in (copy / "report" / "report.md").read_text()
    shipped = evaluate(copy / "onnx", rows)
    # q, k and v are one product there.
    assert not shipped["portable"] and "of 11 integer products" in shipped["note"]


def test_missed_tolerance_fails_the_export(copy, trained, export):
    """Exit code 1, one line, no file left where somebody could take it for the verified one, an old report kept."""
    code, stderr = export(copy, "enabled=true", "max_abs_error=1.0e-30")
    assert code == 1 and "not verified: export: logit error" in stderr and "Traceback" not in stderr
    assert "(validation, batch 1, exact kernels)" in stderr and str(copy / "onnx.failed") in stderr
    assert not (copy / "onnx").exists() and (copy / "onnx.failed" / "model.onnx").is_file()
    assert read_report(copy) == read_report(trained)
