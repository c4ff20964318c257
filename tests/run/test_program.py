"""Programs of stages: each under its own task and rows, heads kept by task and labels, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from compressft.errors import UserError
from compressft.recipe.recipe import Recipe, parse_recipe
from compressft.run.flow import run
from compressft.run.trainer import CompressionTrainer
from tests.run.killed import Killed, killed_and_resumed, trained
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

MASKED = {"type": "masked-lm", "whole_words": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random BERT with MiniLM's tokenizer, texts without labels, and two labelled files."""
    folder = tmp_path_factory.mktemp("program")
    save_tiny(folder / "base")
    rows = rows_of(40)
    (folder / "texts.txt").write_text("\n\n".join(row["text"] for row in rows), encoding="utf-8")
    write_jsonl(folder / "two.jsonl", rows)
    write_jsonl(folder / "three.jsonl", [{**row, "label": f"l{i % 3}"} for i, row in enumerate(rows)])
    return folder


def recipe_of(base: Path, *stages: dict, **changes) -> Recipe:
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", "save": 2}
    return parse_recipe(
        {
            "name": "program",
            "model": str(base / "base"),
            "data": {
                "texts": {"train": str(base / "texts.txt"), "max_length": 24},
                "two": {"train": str(base / "two.jsonl"), "max_length": 16},
                "three": {"train": str(base / "three.jsonl"), "max_length": 16},
            },
            "stages": [{"train": train, **stage} for stage in stages],
            "export": {"enabled": False},
            **changes,
        }
    )


DOMAIN = {"name": "domain", "task": MASKED, "data": "texts"}
MIDDLE = {"name": "middle", "data": "three"}
TARGET = {"name": "target", "data": "two"}
AGAIN = {"name": "again", "data": "three", "method": {"type": "probe"}}
CHAIN = (DOMAIN, MIDDLE, TARGET, AGAIN)


def saved(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "stages" / stage / "model.safetensors")


@pytest.fixture(scope="module")
def chain(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    trained(recipe_of(base, *CHAIN), folder)
    return folder


def test_the_backbone_goes_on_from_stage_to_stage(chain):
    """A probe trains the head alone: the backbone under it is that of the stage before, which had another task."""
    before, after = saved(chain, "target"), saved(chain, "again")
    common = [name for name in before if name.startswith("bert.encoder")]
    assert common and all(torch.equal(before[name], after[name]) for name in common)
    assert not torch.equal(saved(chain, "domain")[common[0]], before[common[0]])


def test_heads_are_of_a_task_and_its_labels(chain):
    assert saved(chain, "domain")["cls.predictions.transform.dense.weight"].shape == (32, 32)
    assert saved(chain, "middle")["classifier.weight"].shape == (3, 32)
    assert saved(chain, "target")["classifier.weight"].shape == (2, 32)
    manifest = json.loads((chain / "stages" / "domain" / "compressft.json").read_text())
    assert (manifest["task"], manifest["task_settings"]["whole_words"], manifest["labels"]) == ("masked-lm", True, [])
    assert json.loads((chain / "stages" / "again" / "compressft.json").read_text())["labels"] == ["l0", "l1", "l2"]


def test_a_head_comes_back_as_it_was_left(base, tmp_path, monkeypatch):
    """At the beginning of a later stage of the same task and labels."""
    seen = {}

    def stop(self, *args, **kwargs):
        if any(t.type == "probe" for t in self.transforms):
            seen.update({name: value.clone() for name, value in self.model.state_dict().items()})
            raise Killed
        return train(self, *args, **kwargs)

    train = CompressionTrainer.train
    monkeypatch.setattr(CompressionTrainer, "train", stop)
    with pytest.raises(Killed):
        trained(recipe_of(base, *CHAIN), tmp_path / "run")
    left = saved(tmp_path / "run", "middle")
    assert torch.equal(seen["classifier.weight"], left["classifier.weight"])


@pytest.mark.dear
@pytest.mark.parametrize("at", [3, 8, 13])
def test_killed_inside_any_stage_and_resumed(base, chain, tmp_path, at):
    """Masks that training draws included: they depend on seed, epoch and row."""
    recipe = recipe_of(base, *CHAIN)
    killed_and_resumed(recipe, tmp_path / "run", at)
    for stage in ("domain", "middle", "target", "again"):
        theirs, ours = saved(chain, stage), saved(tmp_path / "run", stage)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), stage


def test_learning_the_domain_helps_to_predict_it(base, tmp_path):
    """Perplexity of hidden words drops over the stage; rows without labels are enough."""
    train = {"epochs": 12, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32", "save": "no"}
    sources = {"texts": {"train": str(base / "texts.txt"), "max_length": 24}}
    trained(recipe_of(base, {**DOMAIN, "train": train}, data=sources), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [row["metrics"]["perplexity"] for row in rows if row["kind"] == "eval"]
    assert len(found) == 12 and found[-1] < 0.2 * found[0]


@pytest.mark.dear
def test_a_chain_ships_and_its_baseline_is_the_dense_stage_of_the_shipped_task(base, tmp_path):
    report = run(recipe_of(base, DOMAIN, MIDDLE, TARGET), tmp_path / "run", console=Console(quiet=True))
    assert report["task"] == "sequence-classification"
    assert report["quality"]["baseline"] == report["quality"]["torch"]
    assert [stage["name"] for stage in report["stages"]] == ["domain", "middle", "target"]
    assert "analyses" not in report


@pytest.mark.dear
def test_analyses_stand_in_the_report(base, tmp_path):
    asked = [{"type": "closeness", "models": ["base", "target"]}, {"type": "closeness", "models": ["domain", "target"]}]
    recipe = recipe_of(base, DOMAIN, MIDDLE, TARGET, analyses=asked)
    report = run(recipe, tmp_path / "run", console=Console(quiet=True))
    assert [found["models"] for found in report["analyses"]] == [["base", "target"], ["domain", "target"]]
    first, second = (found["summary"]["relative"] for found in report["analyses"])
    assert 0 < second < first, "the later stage is farther from the base than from the one before it"
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "Closeness of base and target" in page
    assert "Closeness of base and target" in (tmp_path / "run" / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (({"name": "a"},), r"stages\.0\.data: is required, as there are several sources"),
        (({**TARGET, "data": "tow"}, MIDDLE, DOMAIN), r"'tow' is no source; named: .*did you mean 'two'"),
        ((TARGET, MIDDLE), r"data\.texts: no stage trains on it"),
        (
            (DOMAIN, MIDDLE, {**TARGET, "objectives": [{"type": "distill", "teacher": "middle"}]}),
            "takes stage 'middle' as its teacher, which has another task or other data",
        ),
    ],
)
def test_programs_that_cannot_be_are_one_line(base, stages, said):
    with pytest.raises(UserError, match=said) as caught:
        recipe_of(base, *stages)
    assert "\n" not in str(caught.value)
