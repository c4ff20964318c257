"""Rows without labels in a whole run: stages with a teacher train on them, others do not; where they make no sense."""

import json

import pytest
from rich.console import Console

from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.run.flow import run
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

TEACHER = {"name": "teacher", "train": {"epochs": 1, "batch_size": 2, "save": "no"}}


def two_stages(tmp_path, **data):
    train = write_jsonl(tmp_path / "train.jsonl", rows_of(20))
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": row["text"]} for row in rows_of(12)])
    recipe = document(save_tiny(tmp_path / "base"), train)
    recipe["data"] |= {"validation": str(train), "unlabelled": str(more), "augment": {"copies": 3.0}, **data}
    student = {"name": "student", "train": TEACHER["train"]}
    recipe["stages"] = [TEACHER, {**student, "objectives": [{"type": "distill", "teacher": "teacher"}]}]
    recipe["export"] = {"enabled": False}
    return recipe


@pytest.mark.dear
def test_only_taught_stages_train_on_them(tmp_path):
    """Pairs of rows, three quarters of them without labels: batches without any label occur and give no NaN."""
    folder = tmp_path / "run"
    run(parse_recipe(two_stages(tmp_path)), folder, False, Console(quiet=True))
    report = json.loads((folder / "report" / "report.json").read_text())
    assert [stage["steps"] for stage in report["stages"]] == [10, (20 + 12 + 60) // 2]
    assert [stage["examples"] for stage in report["stages"]] == [20, 20 + 12 + 60]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(loss == loss and loss < 10 for loss in losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["stages"].pop(), "data.unlabelled: rows without labels need a teacher"),
        (lambda r: r.update(task="regression"), "data.unlabelled: rows without labels are for sequence-classification"),
        (lambda r: r["data"].pop("unlabelled") and r["stages"].pop(), "data.augment: rows without labels need"),
        (lambda r: r["data"].update(augment={"mask": 0.9, "drop": 0.1}), "their sum must be below 1"),
        (lambda r: r["stages"][1]["objectives"][0].update(logits=0.0), "need a teacher"),
    ],
)
def test_refused_at_load(tmp_path, change, message):
    recipe = two_stages(tmp_path)
    change(recipe)
    with pytest.raises(UserError, match=message):
        parse_recipe(recipe)
