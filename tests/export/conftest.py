"""Tiny trained models of every kind that is exported, and the exported files of each."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compressft.evaluation.logits import feed, model_logits
from compressft.export.cache import with_cache
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.onnx import save, to_graph
from compressft.methods.adapter import Adapter
from compressft.model.shrink import shrink
from compressft.passes.int8 import Int8
from compressft.tasks import make_task
from compressft.tasks.task import Task
from compressft.transform import Context
from tests.tiny import LABELS, VOCABULARY, tiny

LENGTHS = (3, 9, 14, 5, 9, 2, 11, 7, 14, 4, 6, 13)


class Pads:
    """The one thing that collating asks of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 1


@dataclass
class Exported:
    """A finalised model, its task and rows, and the graph that is written from it once it is asked for."""

    model: Any
    task: Task
    features: list[dict[str, Any]]
    folder: Path
    fuses: bool

    @cached_property
    def files(self) -> tuple[Path, Path | None]:
        """The plain file, and the one whose attention is fused where it has static ranges."""
        rows = [{k: v for k, v in f.items() if k != "labels"} for f in self.features[:2]]
        inputs = self.task.collate(rows)
        # As they ship.
        inputs = with_cache(self.model, inputs) if self.task.type == "causal-lm" else inputs
        graph = to_graph(fold(self.model), inputs)
        path, fused = self.folder / "model.onnx", self.folder / "fused.onnx"
        save(graph, path)
        if not (self.fuses and fuse_qattention(graph)):
            return path, None
        save(graph, fused)
        return path, fused

    @property
    def path(self) -> Path:
        return self.files[0]

    @property
    def fused(self) -> Path | None:
        return self.files[1]

    def operators(self, fused: bool = False) -> Counter:
        path = self.fused if fused else self.path
        return Counter(node.op_type for node in onnx.load(str(path)).graph.node)

    def logits(self, batch: int, fused: bool = False) -> list[np.ndarray]:
        """The file's logits per row without its paddings, in plain onnxruntime, in the rows' order."""
        path = str(self.fused if fused else self.path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = []
        for start in range(0, len(self.features), batch):
            rows = [{k: v for k, v in f.items() if k != "labels"} for f in self.features[start : start + batch]]
            out = session.run(["logits"], feed(session, self.task.collate(rows)))[0]
            found += [o[: len(r["input_ids"])] if out.ndim == 3 else o for o, r in zip(out, rows, strict=True)]
        return found

    def error(self, batch: int, fused: bool = False) -> float:
        """Largest difference between the file's and the model's logits, as a share of their standard deviation."""
        trained = model_logits(self.model, self.task, self.features)
        spread = np.concatenate([np.ravel(row) for row in trained]).std()
        pairs = zip(trained, self.logits(batch, fused), strict=True)
        return max(float(np.abs(a - b).max()) for a, b in pairs) / float(spread)


def rows_for(task: Task, causal: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        labels: Any = i % LABELS
        if task.type == "regression":
            labels = float(i)
        elif task.type == "token-classification":
            labels = [j % LABELS for j in range(length)]
        elif causal:
            labels = ids
        row = {"input_ids": ids, "attention_mask": [1] * length, "labels": labels}
        if not causal:
            row = {"input_ids": ids, "token_type_ids": [0] * length, **row}
        rows.append(row)
    return rows


def export(
    folder: Path,
    family: str = "bert",
    task: str = "sequence-classification",
    int8: str | None = "static",
    adapter: str | None = None,
    prune: bool = True,
    **changes: Any,
) -> Exported:
    """Build, compress and settle one model."""
    labels = {"sequence-classification": ["a", "b", "c"], "token-classification": ["O", "B-X", "I-X"]}.get(task, [])
    made = make_task(task, Pads(), 16, labels)  # type: ignore[arg-type]
    model = tiny(family, **changes)
    if prune:
        # Another number of heads and neurons in every layer.
        first = {"heads": torch.tensor([0, 2, 3]), "ffn": torch.arange(44)}
        shrink(model, [first, {"heads": torch.tensor([1, 2]), "ffn": torch.arange(5, 40)}])
    if adapter:
        Adapter(placement=adapter, size=5, activation="gelu").prepare(model, Context())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "adapter" in name:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
    features = rows_for(made, made.type == "causal-lm")
    if int8:
        settle(model, Int8(ranges=int8), made, features)
    model.eval()
    return Exported(model, made, features, folder, fuses=int8 == "static")


def settle(model: nn.Module, transform: Int8, task: Task, features: list[dict[str, Any]]) -> None:
    """Learn the ranges from the rows and switch to the deployed arithmetic."""
    transform.prepare(model, Context())
    model.train()
    with torch.no_grad():
        model(**task.collate(copy.deepcopy(features)))
    transform.finalize(model)


KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "dynamic": {"int8": "dynamic", "prune": False},
    "dense": {"int8": None, "prune": False},
    "pruned": {"int8": None},
    "houlsby": {"adapter": "houlsby"},
    "pfeiffer": {"adapter": "pfeiffer"},
    "tokens": {"task": "token-classification", "architecture": "BertForTokenClassification"},
    "regression": {"task": "regression", "num_labels": 1},
    # Grouped-query heads and rotary positions; Conv1D and one projection for q, k and v.
    "llama": {"family": "llama", "task": "causal-lm", "prune": False},
    # A sliding window, whose length is an output of the exported graph.
    "mistral": {"family": "mistral", "task": "causal-lm", "prune": False},
    "gpt2": {"family": "gpt2", "task": "causal-lm", "prune": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}


# Their graphs have the operators of others.
ALIKE = ("houlsby", "regression", "mistral")


def kinds(*names: str) -> list[Any]:
    """Values for `parametrize`; an export takes seconds, so those alike are in the full run alone."""
    return [pytest.param(name, marks=pytest.mark.full) if name in ALIKE else name for name in names]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Kind -> Exported; each is made once, when it is first asked for."""
    made: dict[str, Exported] = {}

    def get(kind: str) -> Exported:
        if kind not in made:
            settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **KINDS[kind]}
            made[kind] = export(tmp_path_factory.mktemp(kind), **settings)
        return made[kind]

    return get
