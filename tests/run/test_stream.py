"""Rows that are read while training goes on: once an epoch, the same after a kill, refused where all are needed."""

import itertools
from collections import Counter

import datasets
import pytest
import torch

from compressft.data import splits as data_splits
from compressft.data.rows import ROW_KEY
from compressft.data.source import DataConfig
from compressft.data.splits import load_splits
from compressft.errors import UserError
from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import parse_recipe, smoke
from compressft.run import stream as run_stream
from compressft.run.identity import inputs
from compressft.run.stream import Stream
from compressft.tasks import TASKS, make_task
from tests.run.killed import killed_and_resumed, trained
from tests.tiny_folder import WORDS, save_tiny, write_jsonl

FIELDS = TASKS["sequence-classification"].fields


def rows_of(number):
    return [
        {"text": " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(2 + i % 6)), "label": "ab"[i % 2]}
        for i in range(number)
    ]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(data_splits, "STREAM_WINDOW", 12)
    monkeypatch.setattr(run_stream, "STREAM_WINDOW", 12)


@pytest.fixture
def files(tmp_path):
    train = [str(write_jsonl(tmp_path / f"train-{i}.jsonl", rows_of(20))) for i in range(2)]
    return {"train": train, "validation": str(write_jsonl(tmp_path / "dev.jsonl", rows_of(6)))}


def streamed(**fields):
    """The splits of a streamed source, and what reads its training rows."""
    found = load_splits(DataConfig(**fields, streaming=True), FIELDS)
    assert found.stream is not None
    return found, found.stream


def document(files, model, **changes):
    return {
        "name": "stream",
        "model": str(model),
        "data": {**files, "max_length": 12, "streaming": True, **changes},
        "stages": [{"name": "one", "train": {"max_steps": 8, "batch_size": 8, "save": 2}}],
        "export": {"enabled": False},
    }


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "base", max_position_embeddings=16)


@pytest.mark.parametrize("name", ["sequence-classification", "masked-lm", "causal-lm"])
def test_every_row_once_an_epoch_without_end(name):
    tokenizer = load_tokenizer("minilm")
    rows = [{**row, ROW_KEY: str(i)} for i, row in enumerate(rows_of(30))]
    task = make_task(name, tokenizer, 16, ("a", "b") if name == "sequence-classification" else ())
    want = Counter(str(feature.get("whole", feature["input_ids"])) for feature in task.encode(rows))
    stream, epoch = Stream(lambda: iter(rows), task, 4, 0), want.total()
    first = list(itertools.islice(stream, 2 * epoch))
    epochs = [first[:epoch], first[epoch:]]
    for features in epochs:
        assert Counter(str(feature.get("whole", feature["input_ids"])) for feature in features) == want
    assert epochs[0] != epochs[1], "the order, and what is hidden, are another in each epoch"
    assert first == list(itertools.islice(Stream(lambda: iter(rows), task, 4, 0), 2 * epoch))
    assert first != list(itertools.islice(Stream(lambda: iter(rows), task, 4, 1), 2 * epoch))


def test_killed_and_resumed(files, model, tmp_path):
    """In the second time through the rows, of which there are 40."""
    recipe = parse_recipe(document(files, model))
    whole = trained(recipe, tmp_path / "whole")
    resumed = killed_and_resumed(recipe, tmp_path / "killed", at=8)
    assert whole.stages[0]["steps"] == 8
    assert whole.stages[0]["validation"] == resumed.stages[0]["validation"]
    states = [one.model.state_dict() for one in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_is_looked_at_is_the_beginning(files):
    found, stream = streamed(**files)
    rows = list(stream())
    assert len(rows) == 40 == len(list(stream())) and rows[:12] == list(found.train) and len(found.train) == 12
    limited, stream = streamed(**files, limit=5)
    assert list(stream()) == rows[:5] == list(limited.train)


def test_a_data_set_of_the_hub(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, number in (("train", 30), ("validation", 4)):
        rows = [{**row, "label": "ab".index(row["label"])} for row in rows_of(number)]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(tmp_path / "hub" / f"{split}.parquet")
    found, stream = streamed(dataset=str(tmp_path / "hub"))
    assert [row["text"] for row in stream()] == [row["text"] for row in rows_of(30)]
    assert {row["label"] for row in stream()} == {"a", "b"} and len(found.validation) == 4
    (tmp_path / "hub" / "validation.parquet").unlink()
    with pytest.raises(UserError, match="no split 'validation'"):
        load_splits(DataConfig(dataset=str(tmp_path / "hub"), streaming=True), FIELDS)


def test_a_label_that_validation_lacks(files, tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", [*rows_of(3), {"text": "x", "label": "c"}])
    with pytest.raises(UserError, match=r"train-0\.jsonl:4: label 'c' does not occur in validation"):
        load_splits(DataConfig(**files, streaming=True), FIELDS)


def test_its_identity_is_its_size_and_time(files, model, tmp_path):
    recipe = parse_recipe(document(files, model))
    before = {one.key: str(one.digest(None)) for one in inputs(recipe)}
    assert "bytes, changed" in before["data.train.0"] and before["data.validation.0"].startswith("sha256:")
    with (tmp_path / "train-0.jsonl").open("a") as file:
        file.write("\n")
    after = {one.key: str(one.digest(None)) for one in inputs(recipe)}
    assert [key for key in before if before[key] != after[key]] == ["data.train.0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation": None}, "a stream has no rows to set aside; give validation"),
        ({"per_class": 3}, "per_class needs all rows at once"),
        ({"augment": {"copies": 1}}, "augment needs all rows at once"),
    ],
)
def test_what_needs_all_rows_is_refused(files, model, changes, said):
    with pytest.raises(UserError, match=said):
        parse_recipe(document(files, model, **changes))


def test_steps_and_shares_are_refused(files, model):
    endless = document(files, model)
    endless["stages"][0]["train"] = {"epochs": 1}
    with pytest.raises(UserError, match=r"max_steps: is required, as data is streamed and has no end"):
        parse_recipe(endless)
    mixed = document(files, model)
    mixed["stages"][0]["feeds"] = [{"data": "rows"}, {"data": "rows", "task": "masked-lm"}]
    mixed["data"] = {"rows": mixed["data"]}
    with pytest.raises(UserError, match=r"data\.rows is streamed, and has no share"):
        parse_recipe(mixed)


def test_smoke_takes_the_first_rows(files, model):
    recipe = smoke(parse_recipe(document(files, model)))
    assert recipe.sources[""].limit == 96 and recipe.sources[""].streaming


def test_a_source_that_is_not_streamed_is_written_as_before(files, model):
    recipe = parse_recipe(document(files, model, streaming=False))
    assert "streaming" not in recipe.to_yaml() and "streaming" in parse_recipe(document(files, model)).to_yaml()
