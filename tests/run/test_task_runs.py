"""Whole runs of tasks whose outputs are neither labels nor tags: trained, saved, scored, and shipped where they are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from compressft.errors import UserError
from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import parse_recipe
from compressft.run.evaluate import evaluate
from compressft.run.flow import run
from tests.run.killed import killed_and_resumed, trained
from tests.tiny import PAIRS
from tests.tiny_folder import WORDS, save_tiny, write_jsonl

# MiniLM's own: padding 0, [SEP] 102.
SPECIAL = {"pad_token_id": 0, "eos_token_id": 102, "bos_token_id": 101}

# Embeddings.


def pairs(number):
    texts = [" ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(2 + i % 5)) for i in range(number)]
    return [{"text": text, "text_b": f"{text} {WORDS[i % 8]}", "score": i % 6} for i, text in enumerate(texts)]


@pytest.mark.dear
def test_masked_texts_then_pairs_ship_as_one_verified_file(tmp_path):
    """A program: the backbone of a masked language model goes on to give embeddings, is quantised and exported."""
    model = save_tiny(tmp_path / "base", max_position_embeddings=48)
    data = write_jsonl(tmp_path / "rows.jsonl", pairs(48))
    document = {
        "name": "pairs",
        "model": str(model),
        "data": {"train": str(data), "max_length": 16},
        "stages": [
            {"name": "domain", "task": "masked-lm", "train": {"max_steps": 2, "batch_size": 8}},
            {"name": "pairs", "task": "embedding", "passes": ["int8"], "train": {"epochs": 1, "batch_size": 8}},
        ],
        "export": {"latency_shapes": [[1, 8]], "latency_rounds": 1},
    }
    report = run(parse_recipe(document), tmp_path / "out", console=Console(quiet=True))
    assert report["quality"]["metric"] == "mrr" and report["quality"]["onnx"] == pytest.approx(
        report["quality"]["torch"], abs=0.05
    )
    # Vectors have length one: errors are of that scale.
    assert report["parity"]["label_agreement"] is None and report["parity"]["max_abs_error"] < 0.05
    found = {folder: evaluate(tmp_path / "out" / folder, data)["mrr"] for folder in ("model", "delta", "onnx")}
    assert found["delta"] == pytest.approx(found["model"]) and found["onnx"] == pytest.approx(found["model"], abs=0.05)
    session_output(tmp_path / "out" / "onnx" / "model.onnx")
    manifest = json.loads((tmp_path / "out" / "onnx" / "compressft.json").read_text())
    assert manifest["task"] == "embedding"


@pytest.mark.dear
def test_killed_amid_pairs_and_masks_and_resumed(tmp_path):
    """Two feeds, of which the first gives vectors; bit for bit what an uninterrupted run ends with."""
    model = save_tiny(tmp_path / "base", max_position_embeddings=48)
    data = write_jsonl(tmp_path / "rows.jsonl", pairs(40))
    source = {"train": str(data), "max_length": 16}
    document = {
        "name": "both",
        "model": str(model),
        "data": {"pairs": source, "texts": source},
        "stages": [
            {
                "name": "both",
                "feeds": [
                    {"task": "embedding", "data": "pairs"},
                    {"task": "masked-lm", "data": "texts", "share": 0.4},
                ],
                "train": {"epochs": 2, "batch_size": 8, "save": 2, "precision": "fp32"},
            }
        ],
        "export": {"enabled": False},
    }
    recipe = parse_recipe(document)
    whole = trained(recipe, tmp_path / "whole").model.state_dict()
    again = killed_and_resumed(recipe, tmp_path / "again", 6).model.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def session_output(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_outputs()] == ["sentence_embedding"]
    ids = np.array([[101, 2000, 2001, 102]])
    given_ = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (vector,) = session.run(None, {one.name: given_[one.name] for one in session.get_inputs()})
    assert np.linalg.norm(vector[0]) == pytest.approx(1.0, abs=1e-3)


# Sequence to sequence.


def copies(number):
    """The first two words of a text, to be written down."""
    generator = np.random.default_rng(0)
    texts = [[WORDS[i] for i in generator.integers(0, len(WORDS), 3)] for _ in range(number)]
    return [{"text": " ".join(text), "target": " ".join(text[:2])} for text in texts]


@pytest.mark.dear
@pytest.mark.parametrize("family", PAIRS)
def test_a_run_learns_to_write_and_its_folders_write_the_same(tmp_path, family):
    tokenizer = load_tokenizer("minilm")
    wide = {"d_model": 64, "d_kv": 16} if family == "t5" else {"d_model": 64}
    settings = {**PAIRS[family][1], "vocab_size": len(tokenizer), **SPECIAL, **wide}
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(family, **settings))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = write_jsonl(tmp_path / "rows.jsonl", copies(96))
    document = {
        "name": "writes",
        "model": str(tmp_path / "base"),
        "task": {"type": "seq2seq", "target_length": 6},
        "data": {"train": str(data), "max_length": 8},
        "stages": [
            {"name": "full", "train": {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32"}},
            {
                "name": "student",
                "method": {"type": "adapter", "placement": "houlsby"},
                "objectives": [{"type": "distill", "teacher": "full"}],
                "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
            },
        ],
        "export": {"enabled": False},
    }
    report = run(parse_recipe(document), tmp_path / "out", console=Console(quiet=True))
    assert report["quality"]["metric"] == "rouge_l"
    losses = [row["validation"]["loss"] for row in report["stages"]]
    assert losses[0] < 0.7 * math.log(len(tokenizer)), "of a model that guesses among all pieces"
    if family == "t5":
        # One that has learned to write the commonest word has more than one that writes nothing.
        assert report["quality"]["baseline"] > 0.1
    found = [evaluate(tmp_path / "out" / folder, data)["rouge_l"] for folder in ("model", "delta")]
    assert found[0] == pytest.approx(found[1])


def test_an_export_is_refused_before_anything_is_trained(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", copies(8))
    document = {
        "name": "writes",
        "model": "t5",
        "task": "seq2seq",
        "data": {"train": str(data)},
        "stages": [{"name": "only"}],
    }
    with pytest.raises(UserError, match="models of task 'seq2seq' have no ONNX file"):
        run(parse_recipe(document), tmp_path / "out", console=Console(quiet=True))
    assert not (tmp_path / "out").exists()
