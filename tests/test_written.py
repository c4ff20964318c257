"""Folders that version 0.1 wrote: every one still opens, computes the same, and a stopped run goes on.

`tests/written/0.1` was written by the command line in that folder: runs of `student`, `adapter`, `prefix` and `lora`,
one that was stopped, adapters made of two of them with `compressft convert`, and a task vector. What each computed on
the first eight rows is in `logits.safetensors`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import compressft
from compressft.model.source import load_tokenizer

WRITTEN = Path(__file__).parent / "written" / "0.1"
RUNS = ("student", "adapter", "prefix", "lora")
HEAD = "AutoModelForSequenceClassification"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folder in the working directory: its recipes name files by relative paths."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def computed(model: torch.nn.Module) -> torch.Tensor:
    """Logits of the first eight rows (8, 2)."""
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()[:8]]
    batch = load_tokenizer("base")([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


def check(model: torch.nn.Module, name: str) -> None:
    torch.testing.assert_close(computed(model), load_file("logits.safetensors")[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", RUNS)
def test_models_and_deltas_compute_the_same(old, run):
    check(compressft.load_compressed(f"{run}/model"), f"{run}/model")
    check(compressft.load_delta(f"{run}/delta"), f"{run}/delta")


@pytest.mark.parametrize("name", ["adapter", "lora"])
def test_saved_adapters_compute_the_same(old, name):
    base = compressft.load_model("base", HEAD, num_labels=2)
    check(compressft.Adapted.from_pretrained(base, f"saved-{name}"), f"saved-{name}")


def test_task_vectors_apply(old):
    base = compressft.load_model("base", HEAD, num_labels=2)
    own = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("classifier.")}
    tensors = compressft.TaskVector.load("teacher.vector.safetensors").apply(own)
    base.load_state_dict(tensors)
    check(base, "teacher")


@pytest.mark.dear
@pytest.mark.parametrize("run", RUNS)
def test_runs_are_scored_and_reported(old, run, call):
    report = json.loads(Path(f"{run}/report/report.json").read_text())
    for folder, key in (("model", "torch"), ("onnx", "onnx"), ("", "torch")):
        done = call("evaluate", Path(run) / folder, "--data", "rows.jsonl", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["accuracy"] == pytest.approx(report["quality"][key])
    assert call("report", run).code == 0
    assert Path(f"{run}/report/report.html").is_file()


@pytest.mark.dear
def test_stopped_run_goes_on(old):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "compressft", "run", "stopped.yaml", "--output", "stopped", "--resume"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in Path("stopped/metrics.jsonl").read_text().splitlines()]
    # 36 rows in batches of 8, 20 epochs.
    assert steps == sorted(steps) and steps[-1] == 100
    assert (
        json.loads(Path("stopped/report/report.json").read_text())["recipe_hash"]
        == (json.loads((WRITTEN / "stopped" / "identity.json").read_text())["recipe"])
    )


@pytest.mark.dear
def test_finished_run_is_exported_again(old, call):
    done = call("export", "adapter", "--set", "export.attention=fused")
    assert done.code == 0, done.err
    assert json.loads(Path("adapter/report/report.json").read_text())["quality"]["onnx"] is not None


def test_old_runs_are_analysed(old, call):
    done = call("analyse", "student/stages/teacher", "student/stages/student", "--type", "closeness", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["type"] == "closeness" and 0 < found["summary"]["relative"] < 1
    assert call("analyse", "lora", "--type", "closeness").code == 0
