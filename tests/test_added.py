"""A stranger adds a task, a method, an objective, a pass and an analysis: one file each and one row, nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from compressft.evaluation.analyses import ANALYSES
from compressft.methods import METHODS
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.program import Stage
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


# What declares its company: one takes, one changes and wants, one changes and gives.
COMPANY = {
    "fp8": """
from typing import Literal
from compressft.transform import QUANTISES, Claim, Resource, Transform


class Added(Transform):
    type: Literal["fp8"] = "fp8"
    order = QUANTISES

    def takes(self):
        return [Claim(Resource.ARITHMETIC, "multiplies in fp8")]
""",
    "sketch": """
from typing import Literal
from compressft.transform import Claim, Resource, Transform, Want


class Added(Transform):
    type: Literal["sketch"] = "sketch"
    rows: int = 8

    def changes(self):
        return [Claim(Resource.VALUES, "rotates the weights", "rows", "set rows to 0")] if self.rows else []

    def wants(self):
        return [Want(Resource.HIDDEN, "sketches all dimensions", "rows", "sketch in an earlier stage")]
""",
    "halve": """
from typing import Literal
from compressft.transform import REMOVES, Claim, Resource, Transform


class Added(Transform):
    type: Literal["halve"] = "halve"
    order = REMOVES
    gives = (Resource.STARTING_LAYERS,)

    def changes(self):
        return [Claim(Resource.STARTING_LAYERS, "drops every other layer")]

    def kept(self, depth, context):
        return range(0, depth, 2)
""",
}
KINDS = {"fp8": "pass", "sketch": "method", "halve": "pass"}


def load(monkeypatch, path, source):
    """A module of this source."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def company(tmp_path, monkeypatch):
    for name, source in COMPANY.items():
        module = load(monkeypatch, tmp_path / f"added_{name}.py", source)
        monkeypatch.setitem(REGISTRIES[KINDS[name]], name, module.Added)


@pytest.fixture
def added(tmp_path, monkeypatch):
    for kind, source in FILES.items():
        module = load(monkeypatch, tmp_path / f"added_{kind}.py", source)
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


ORIGIN = {"type": "distill", "teacher": "t", "hidden": 1.0, "layer_map": "origin"}
STACKED = {"type": "adapter", "placement": "pfeiffer", "stack": ["a"]}


@pytest.mark.parametrize(
    ("members", "said"),
    [
        # Both take: the added one first and last.
        (["full", "fp8", "int8"], "pass 'fp8' and pass 'int8' both decide in which arithmetic a layer computes"),
        (["full", "int4", "fp8"], "pass 'int4' and pass 'fp8' both decide in which arithmetic a layer computes"),
        # A shipped one wants what an added one changes, by its own word or by its order's.
        (["sketch", "nf4"], "method sketch.rows rotates the weights; set rows to 0, or take a method that freezes"),
        (
            [STACKED, "halve"],
            "method adapter.stack: saved adapters want the layers that they were trained on, and",
        ),
        (["probe", "fp8"], "method probe.cache: computes features once, and pass 'fp8' changes what the layers give"),
        # An added one wants what a shipped one takes.
        (
            ["sketch", {"type": "structured", "hidden": 0.5}],
            "method sketch.rows: sketches all dimensions, and pass structured.hidden removes hidden dimensions; ",
        ),
        # A shipped one wants to be given what an added one gives.
        (["full", ORIGIN], "add pass 'ziplm' or pass 'depth' or pass 'halve', or use uniform"),
        (["full", ORIGIN, "halve"], None),
        # What shares nothing may stand together, added or shipped.
        (["sketch", "fp8", "halve"], None),
        ([{"type": "sketch", "rows": 0}, "nf4"], None),
        (["sketch", {"type": "structured", "ffn": 0.5}, "fp8"], None),
        ([{"type": "probe", "cache": False}, "fp8"], None),
    ],
)
def test_what_they_declare_decides_beside_whom_they_stand(company, members, said):
    method, *others = members
    objectives = [one for one in others if one is ORIGIN]
    stage = {"name": "one", "method": method, "objectives": objectives}
    stage["passes"] = [one for one in others if one is not ORIGIN]
    if said is None:
        Stage(**stage)
        return
    with pytest.raises(ValidationError) as refused:
        Stage(**stage)
    assert said in str(refused.value)


def test_without_their_rows_they_are_unknown(tmp_path):
    for kind, name in NAMES.items():
        assert name not in REGISTRIES[kind]
