"""Scoring shipped folders on files: the figures computed again by hand, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compressft.errors import UserError
from compressft.model.load import load_model
from compressft.model.saved.compressed import save_compressed
from compressft.model.saved.delta import base_tensors, save_delta
from compressft.model.source import load_tokenizer
from compressft.run.evaluate import evaluate
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

LABELS = ["even", "odd"]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> Path:
    """A folder with `model/` and `delta/` of a tiny classifier that no pass has touched."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(3)
    base = str(save_tiny(folder / "base"))
    names = dict(enumerate(LABELS))
    model = load_model(base, "AutoModelForSequenceClassification", num_labels=2, id2label=names)
    with torch.no_grad():
        # Far from constant, so that rows get different labels.
        model.classifier.weight.mul_(50)
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.mul_(30)
    info = {
        "model": base,
        "task": "sequence-classification",
        "labels": LABELS,
        "max_length": 16,
        "columns": {"text": "query"},
        "metric": "accuracy",
    }
    save_compressed(model, load_tokenizer(base), folder / "model", info)
    save_delta(model, load_tokenizer(base), base_tensors(base), folder / "delta", info)
    return folder


@pytest.fixture
def file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"query": r["text"], "label": r["label"]} for r in rows_of(31)])


def by_hand(folder: Path) -> dict[str, float]:
    """transformers alone, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    guessed = []
    for row in rows_of(31):
        encoded = tokenizer(row["text"], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            guessed.append(LABELS[int(model(**encoded).logits.argmax())])
    truth = [row["label"] for row in rows_of(31)]
    return {"accuracy": accuracy_score(truth, guessed), "f1_macro": f1_score(truth, guessed, average="macro")}


@pytest.mark.parametrize("source", ["model", "delta"])
@pytest.mark.parametrize("batch", [1, 32])
def test_figures(shipped, file, source, batch):
    expected = by_hand(shipped / "model")
    assert 0.1 < expected["accuracy"] < 0.9
    result = evaluate(shipped / source, file, batch)
    figures = {k: pytest.approx(v) for k, v in expected.items()}
    assert result == {"runtime": "torch", "rows": 31, **figures, "portable": True}


def test_run_directory_means_its_model(shipped, file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("name: r")
    (tmp_path / "run" / "model").symlink_to(shipped / "model")
    assert evaluate(tmp_path / "run", file) == evaluate(shipped / "model", file)


def test_unknown_label_is_named_with_its_line(shipped, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"query": "a", "label": "odd"}, {"query": "b", "label": "prime"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: label 'prime'"):
        evaluate(shipped / "model", file)


def test_missing_column_is_named(shipped, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "odd"}])
    with pytest.raises(UserError, match="no column 'query' for 'text'"):
        evaluate(shipped / "model", file)


def test_what_is_no_model_is_refused(shipped, file, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        evaluate(tmp_path / "nowhere", file)
    with pytest.raises(UserError, match=r"compressft\.json"):
        evaluate(shipped / "base", file)
    save_compressed(load_model(str(shipped / "base")), None, tmp_path / "bare", {})
    with pytest.raises(UserError, match="does not say what task"):
        evaluate(tmp_path / "bare", file)


def test_damaged_folder_is_refused(shipped, file, tmp_path):
    import shutil

    folder = Path(shutil.copytree(shipped / "model", tmp_path / "model"))
    manifest = json.loads((folder / "compressft.json").read_text())
    assert "model.safetensors" in manifest["files"]
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        evaluate(folder, file)


def test_an_evaluation_that_takes_long_says_how_far_it_is(shipped, file, call, monkeypatch):
    rows = file.read_text() * 20
    file.write_text(rows)
    monkeypatch.setattr("compressft.utils.phases.PATIENCE", 0.01)
    done = call("evaluate", shipped / "model", "--data", file, "--batch", 1)
    assert done.code == 0 and "accuracy" in done.out
    assert any(line.startswith("evaluating: ") and "/620  " in line for line in done.err.splitlines())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"type": "masked-lm", "rate": 2}, r"field 'task_settings': task masked-lm.*rate.*restore the file"),
        ({"type": "masked-lm"}, r"task 'sequence-classification' and task_settings differ; restore the file"),
        ({"type": "unheard-of"}, r"field 'task_settings': task 'unheard-of' is not known"),
    ],
)
def test_settings_of_the_task_that_do_not_hold_are_refused(tmp_path, file, settings, said):
    base = str(save_tiny(tmp_path / "base"))
    model = load_model(base, "AutoModelForSequenceClassification", num_labels=2)
    info = {
        "task": "sequence-classification",
        "labels": LABELS,
        "max_length": 16,
        "columns": {},
        "task_settings": settings,
    }
    save_compressed(model, load_tokenizer(base), tmp_path / "model", info)
    with pytest.raises(UserError, match=said):
        evaluate(tmp_path / "model", file)
