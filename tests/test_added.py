"""A stranger adds a task, a method, an objective, a pass and an analysis: one file each and one row, nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from compressft.evaluation.analyses import ANALYSES
from compressft.methods import METHODS
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.recipe import parse_recipe
from compressft.recipe.schema import recipe_schema
from compressft.run.flow import run
from compressft.tasks import TASKS
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

FILES = {
    # Whether a text is short: labels that no row has to give.
    "task": """
from compressft.data.fields import Fields
from compressft.tasks.classify import SequenceClassification


class Length(SequenceClassification):
    type = "length"
    fields = Fields(("text",))

    @classmethod
    def labels_of(cls, rows):
        return ("long", "short")

    def encode(self, rows):
        labels = [int(len(row["text"].split()) < 5) for row in rows]
        return [{**f, "labels": label} for f, label in zip(self._tokenise(rows), labels, strict=True)]
""",
    "method": """
from typing import Literal
from compressft.model.surgery import head_parameters
from compressft.transform import Transform


class Biases(Transform):
    type: Literal["biases"] = "biases"

    def prepare(self, model, context):
        head = {name for name, _ in head_parameters(model)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head or name.endswith(".bias"))
""",
    "objective": """
from typing import Literal
from pydantic import Field
from compressft.transform import OBJECTIVE, Transform


class Quiet(Transform):
    type: Literal["quiet"] = "quiet"
    weight: float = Field(default=0.01, ge=0)
    order = OBJECTIVE

    def loss(self, model, batch, outputs, context):
        return {"quiet.logits": self.weight * outputs.logits.square().mean()}
""",
    "pass": """
from typing import Literal
import torch
from compressft.model.anatomy import anatomy
from compressft.transform import Transform


class Clip(Transform):
    type: Literal["clip"] = "clip"
    bound: float = 0.1

    @torch.no_grad()
    def after_step(self, model, progress):
        for layer in anatomy(model).layers:
            layer.part(layer.family.down).weight.clamp_(-self.bound, self.bound)
""",
    "analysis": """
from typing import Literal
from compressft.evaluation.analyses.analysis import Analysis, Finding


class Largest(Analysis):
    type: Literal["largest"] = "largest"

    def find(self, subjects):
        rows = []
        for name in subjects.names:
            model = subjects.load(name)
            rows.append((name, float(model.bert.encoder.layer[0].output.dense.weight.detach().abs().max())))
        return Finding("Largest weights", "Two numbers", ("model", "largest"), tuple(rows))
""",
}
CLASSES = {"task": "Length", "method": "Biases", "objective": "Quiet", "pass": "Clip", "analysis": "Largest"}
REGISTRIES = {"task": TASKS, "method": METHODS, "objective": OBJECTIVES, "pass": PASSES, "analysis": ANALYSES}
NAMES = {"task": "length", "method": "biases", "objective": "quiet", "pass": "clip", "analysis": "largest"}


@pytest.fixture
def added(tmp_path, monkeypatch):
    for kind, source in FILES.items():
        path = tmp_path / f"added_{kind}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(REGISTRIES[kind], NAMES[kind], getattr(module, CLASSES[kind]))


def document(tmp_path: Path) -> dict:
    rows = [{"text": row["text"]} for row in rows_of(40)]
    return {
        "name": "added",
        "model": str(save_tiny(tmp_path / "model")),
        "task": "length",
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "max_length": 16},
        "stages": [
            {
                "name": "only",
                "method": "biases",
                "objectives": [{"type": "quiet", "weight": 0.1}],
                "passes": [{"type": "clip", "bound": 0.03}],
                "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
            }
        ],
        "analyses": [{"type": "largest", "models": ["base", "only"]}],
        "export": {"latency_rounds": 1, "latency_shapes": [[1, 8]], "metric_drop": 1.0},
    }


@pytest.mark.dear
def test_one_of_each_runs_to_the_report_and_ships(added, tmp_path):
    report = run(parse_recipe(document(tmp_path)), tmp_path / "run", console=Console(quiet=True))
    assert report["task"] == "length"
    assert report["parity"]["label_agreement"] == 1.0
    (found,) = report["analyses"]
    before, after = (row[1] for row in found["rows"])
    assert after == pytest.approx(0.03) and after < before
    trained = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("quiet.logits" in row.get("terms", {}) for row in trained)
    assert report["stages"][0]["trainable"] < report["parameters"]["total"] / 10
    assert json.loads((tmp_path / "run" / "onnx" / "compressft.json").read_text())["labels"] == ["long", "short"]


def test_one_of_each_is_in_the_schema(added):
    definitions = recipe_schema()["$defs"]
    assert {f"{kind}.{name}" for kind, name in NAMES.items()} <= set(definitions)
    assert definitions["pass.clip"]["properties"]["bound"]["default"] == 0.1


def test_without_their_rows_they_are_unknown(tmp_path):
    for kind, name in NAMES.items():
        assert name not in REGISTRIES[kind]
