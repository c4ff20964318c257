"""The plug-in promise: a pass in a file of its own plus one registry row trains without any other change."""

import importlib.util
import sys

import pytest
import torch

from compressft.model.source import load_tokenizer
from compressft.passes import PASSES
from compressft.recipe.program import Stage
from compressft.run.trainer import CompressionTrainer, Lesson
from compressft.tasks import make_task
from compressft.transform import Context
from tests.tiny import tiny

SOURCE = '''
"""Keep every FFN up-projection's weights within a bound that tightens over training."""

from typing import Literal

import torch

from compressft.model.anatomy import anatomy
from compressft.transform import Transform


class Clip(Transform):
    type: Literal["clip"] = "clip"
    bound: float = 0.1

    def prepare(self, model, context):
        model.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def weights(self, model):
        return [layer.part(path).weight for layer in anatomy(model).layers for path in layer.family.up]

    def loss(self, model, batch, outputs, context):
        return {"clip.size": 1e-3 * sum(w.square().sum() for w in self.weights(model))}

    @torch.no_grad()
    def after_step(self, model, progress):
        model.seen[int(progress * 2)] = progress + 1.0
        if progress > 0:
            for weight in self.weights(model):
                weight.clamp_(-self.bound / progress, self.bound / progress)

    def finalize(self, model):
        del model.seen
'''


@pytest.fixture
def clip(tmp_path, monkeypatch):
    path = tmp_path / "clip.py"
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("clip_pass", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "clip_pass", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(PASSES, "clip", module.Clip)


def test_a_new_pass_is_one_file_and_one_row(clip, tmp_path):
    stage = Stage(
        name="one",
        passes=[{"type": "clip", "bound": 0.05}, {"type": "int8", "ranges": "dynamic"}],
        train={"max_steps": 2, "batch_size": 4, "precision": "fp32", "save": "no"},
    )
    assert [t.type for t in stage.transforms] == ["full", "clip", "int8"]
    tokenizer = load_tokenizer("minilm")
    task = make_task("sequence-classification", tokenizer, 16, ["no", "yes"])
    rows = [{"text": f"a small example number {i}", "label": ("no", "yes")[i % 2], "__row__": str(i)} for i in range(8)]
    features = task.encode(rows)
    model = tiny(vocab_size=len(tokenizer), num_labels=2)
    context = Context(transforms=stage.transforms)
    for transform in stage.transforms:
        transform.prepare(model, context)
    trainer = CompressionTrainer(
        model, Lesson(task, stage.train, features, features[:4]), context, tmp_path / "checkpoints"
    )
    trainer.train()
    assert model.seen.tolist() == [1.0, 1.5, 2.0], "called at the start and after each of the two steps"
    assert trainer.drain_terms().keys() == {"task", "clip.size"}
    for transform in stage.transforms:
        transform.finalize(model)
    for layer in model.bert.encoder.layer:
        assert layer.intermediate.dense.weight.abs().max() <= 0.05
        assert layer.output.dense.weight.abs().max() > 0.3
    assert not hasattr(model, "seen")
    assert model(**task.collate(features)).logits.isfinite().all()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def test_without_its_row_it_is_unknown():
    with pytest.raises(ValueError, match=f"pass 'clip' is not known; allowed: {', '.join(sorted(PASSES))}"):
        Stage(name="one", passes=["clip"])
