"""Whole runs that distil: broken off and resumed, they end with the bits of one that was left alone."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from compressft.model.source import load_tokenizer
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.cache import AnswerCache
from compressft.recipe.recipe import parse_recipe
from compressft.run.feed import load_feeds
from compressft.run.folder import RunFolder
from compressft.run.program import train_stages
from compressft.run.records import Run
from tests.tiny import tiny
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

pytestmark = pytest.mark.dear

# Three steps are an epoch.
STEPS = 8
SETTINGS = {
    "inside": {
        "hidden": 1.0,
        "projection": "pair",
        "layer_map": "learned",
        "attention": 1.0,
        "relations": 1.0,
        "intermediate_until": 0.6,
    },
    "kept": {"hidden": 1.0, "cosine": 1.0, "intermediate_until": 0.6, "cache": True, "cache_precision": "fp16"},
}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    save_tiny(folder / "base", num_hidden_layers=4)
    teacher = tiny(seed=3, hidden_size=48, num_hidden_layers=4, num_labels=2, vocab_size=len(load_tokenizer("minilm")))
    teacher.save_pretrained(folder / "teacher")
    write_jsonl(folder / "train.jsonl", rows_of(24))
    return folder


def recipe_of(base: Path, settings: dict, every: int):
    train = {"batch_size": 8, "save": every, "learning_rate": 1e-3, "precision": "fp32", "max_steps": STEPS}
    distill = {"type": "distill", "teacher": str(base / "teacher"), **settings}
    stage = {"name": "student", "objectives": [distill], "passes": [{"type": "depth", "keep": 2}], "train": train}
    return parse_recipe(
        {
            "name": "tiny",
            "model": str(base / "base"),
            "data": {"train": str(base / "train.jsonl"), "max_length": 16},
            "stages": [stage],
            "export": {"enabled": False},
        }
    )


def train(recipe, folder: Path, resume: bool = False):
    """The trained model's tensors."""
    console = Console(file=io.StringIO())
    with RunFolder(folder, recipe, resume) as held:
        trained = train_stages(Run(recipe, held, console), load_feeds(recipe, load_tokenizer(recipe.model)))
    return trained.model.state_dict()


@pytest.mark.parametrize(("name", "every"), [("inside", 4), ("kept", 3)])
def test_broken_off_and_resumed(name, every, base, tmp_path, monkeypatch):
    """From a checkpoint amid an epoch, and from one at its end."""
    recipe = recipe_of(base, SETTINGS[name], every)
    theirs = train(recipe, tmp_path / "whole")
    follow = Distill.after_step

    def kill(self, model, progress):
        follow(self, model, progress)
        if progress > 0.7:
            raise Killed

    monkeypatch.setattr(Distill, "after_step", kill)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "broken")
    (written,) = (tmp_path / "broken" / "checkpoints").glob("step-*")
    kept = load_file(written / "model.safetensors")
    assert any("distillation.projections" in key for key in kept)
    monkeypatch.undo()
    asked = []
    store = AnswerCache._store
    monkeypatch.setattr(AnswerCache, "_store", lambda self, *args: asked.append(1) or store(self, *args))
    ours = train(recipe, tmp_path / "broken", resume=True)
    assert not asked, "every example had its answer before the kill"
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not any("distillation" in key for key in ours)
    assert sum("attention.self.query.weight" in key for key in ours) == 2
    assert (tmp_path / "broken" / "cache").exists() == (name == "kept")
