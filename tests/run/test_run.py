"""One smoke run of the shipped demo through the real command line, and everything its directory promises."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import transformers
from safetensors import safe_open

from compressft import cli
from compressft.model.saved.compressed import load_compressed
from compressft.model.source import load_tokenizer, resolve
from compressft.recipe.recipe import load_recipe
from compressft.run.feed import load_shipped
from compressft.run.plan.predict import plan

REPORT_KEYS = {
    "quality": {"metric", "split", "baseline", "torch", "onnx"},
    "parity": {"split", "max_abs_error", "label_agreement"},
    "size_bytes": {"base_onnx", "onnx", "model", "delta"},
    "parameters": {"base", "total", "trainable", "nonzero"},
    "training": {"seconds", "examples_per_second", "tokens_per_second", "peak_memory_bytes"},
}
# Seconds that the finished run took, by its folder.
WALL: dict[Path, float] = {}
LATENCY_KEYS = {"runtime", "model", "batch", "length", "p50", "p90", "threads"}


@pytest.fixture(scope="session")
def base(request, tmp_path_factory) -> str:
    """What the demo starts from: MiniLM, of which `make test` takes two layers (a layer more is seconds more)."""
    if request.config.getoption("all"):
        return "minilm"
    folder = tmp_path_factory.mktemp("base")
    transformers.AutoModel.from_pretrained(resolve("minilm"), num_hidden_layers=2).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def layers(base) -> int:
    return transformers.AutoConfig.from_pretrained(resolve(base)).num_hidden_layers


@pytest.fixture(scope="session")
def smoke(base) -> list[str]:
    """The command line."""
    return ["run", "banking77-edge", "--smoke", "--set", f"model={base}"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, smoke) -> Path:
    """The directory of a finished `compressft run banking77-edge --smoke`; tests must not change it."""
    folder = tmp_path_factory.mktemp("smoke") / "run"
    paths = os.pathsep.join(p for p in sys.path if p)
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "compressft", *smoke, "--output", str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    WALL[folder] = time.perf_counter() - begun
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert str(folder / "onnx" / "model.onnx") in done.stdout.replace("\n", "")
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run that may be changed (hard links: the program replaces files, it never edits them)."""
    return Path(shutil.copytree(finished, tmp_path / "run", copy_function=os.link))


@pytest.fixture(scope="session")
def report(finished) -> dict:
    return json.loads((finished / "report" / "report.json").read_text())


@pytest.fixture(scope="session")
def held_out(finished) -> list[dict]:
    """The test rows of the run."""
    recipe = load_recipe(finished / "recipe.yaml")
    return load_shipped(recipe, load_tokenizer(recipe.model)).splits.test


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["compressft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    return call


def fingerprint(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and content of every file."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in folder.rglob("*")
        if p.is_file()
    }


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def test_all_seconds_are_in_the_report(finished, report):
    spent = report["seconds"]
    assert {"loading", "search", "training", "evaluation", "saving", "export", "verification", "latency"} <= set(spent)
    # Python's own start and end are in no phase.
    assert 0.98 * WALL[finished] - 3.0 < sum(spent.values()) < WALL[finished]
    assert spent["other"] < 0.1 * sum(spent.values())


def test_the_peak_is_the_whole_runs_and_was_planned(finished, report):
    """Of the process, export and verification included; the plan is from shapes alone."""
    peak = report["peak_memory_bytes"]
    assert peak >= max(stage["peak_memory_bytes"] for stage in report["stages"])
    assert 0.9 * peak < plan(load_recipe(finished / "recipe.yaml")).peak < 1.25 * peak


def test_directory_has_what_the_contract_lists(finished):
    for name in ("recipe.yaml", "metrics.jsonl"):
        assert (finished / name).stat().st_size > 0
    listed = {
        "delta": {"compressft.json", "delta.safetensors"},
        "model": {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"},
        "onnx": {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"},
        "report": {"report.json", "report.md", "report.html"},
    }
    for folder, names in listed.items():
        assert names <= {p.name for p in (finished / folder).iterdir()}, folder
    assert list((finished / "report").glob("*.png"))
    # A finished run asks its teacher nothing more.
    assert not (finished / "cache").exists()
    checkpoints = [p for p in (finished / "checkpoints").iterdir() if p.name.startswith("step-")]
    assert checkpoints and all((p / "optimizer.pt").is_file() for p in checkpoints)


def test_nothing_that_ships_is_a_pickle(finished):
    """Every shipped file is opened as what its suffix says."""
    for path in (p for f in ("delta", "model", "onnx") for p in (finished / f).rglob("*") if p.is_file()):
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy") as tensors:
                assert list(tensors.keys())
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(str(path)), full_check=False, check_custom_domain=False)
        else:
            assert path.suffix in (".json", ".txt", ".md"), path
            text = path.read_text(encoding="utf-8")
            assert path.suffix != ".json" or json.loads(text) is not None


def test_metrics_has_both_stages(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows if r["kind"] == "eval"] == [("teacher", 4), ("student", 8)]


def test_report_has_the_contract_keys(report):
    for key, inner in REPORT_KEYS.items():
        assert inner <= set(report[key]), key
        assert all(report[key][name] is not None for name in inner), key
    assert all(set(row) >= LATENCY_KEYS for row in report["latency_ms"])
    assert {"versions", "hardware", "recipe_hash"} <= set(report)


def test_the_baseline_is_compared_with_what_it_had(report):
    assert report["steps"] == {"baseline": 4, "shipped": 8}
    assert [n for n in report["notes"] if n.startswith("the dense baseline had 4 optimiser steps") and "8 in all" in n]
    # Rows, not steps times a batch that the last of an epoch may not fill.
    assert [stage["examples"] for stage in report["stages"]] == [32, 32]
    for stage in report["stages"]:
        assert stage["examples_per_second"] == pytest.approx(stage["examples"] / stage["seconds"])


def test_report_is_about_the_files(finished, report):
    """Sizes, counts and hashes computed again from the files themselves."""
    assert report["size_bytes"]["onnx"] == (finished / "onnx" / "model.onnx").stat().st_size
    assert report["size_bytes"]["model"] == sum(p.stat().st_size for p in (finished / "model").glob("*.safetensors"))
    assert report["size_bytes"]["delta"] == (finished / "delta" / "delta.safetensors").stat().st_size
    parameters = list(load_compressed(finished / "model").parameters())
    assert report["parameters"]["total"] == sum(p.numel() for p in parameters)
    assert report["parameters"]["nonzero"] == sum(int((p != 0).sum()) for p in parameters)
    # Vocabulary, heads and neurons all go before training.
    assert report["parameters"]["total"] == report["parameters"]["trainable"] < report["parameters"]["base"]
    flops = report["flops"]
    assert 0 < flops["kept"] < flops["base"]
    assert report["recipe_hash"] == load_recipe(finished / "recipe.yaml").hash
    assert report["versions"]["torch"] == version("torch")


def test_report_values_are_sane(report, layers):
    quality = report["quality"]
    assert (quality["metric"], quality["split"]) == ("accuracy", "test")
    assert all(0 <= quality[name] <= 1 for name in ("baseline", "torch", "onnx"))
    assert report["parity"]["split"] == "test"
    assert 0 <= report["parity"]["max_abs_error"] < 0.1
    assert report["size_bytes"]["base_onnx"] > 4 * report["size_bytes"]["onnx"] > 0
    assert all(value > 0 for value in report["training"].values())
    seen = {(row["runtime"], row["model"]) for row in report["latency_ms"]}
    assert seen == {("onnxruntime", "compressed"), ("onnxruntime", "base_fp32"), ("torch", "base_fp32")}
    assert all(0 < row["p50"] <= row["p90"] for row in report["latency_ms"])
    kept, base = report["shapes"]["kept"], report["shapes"]["base"]
    ziplm = next(p for p in load_recipe("banking77-edge").stages[1].passes if p.type == "ziplm")
    # Of MiniLM's 384 values a token: a head's four matrices have 32 of them, a neuron's two have one.
    sizes = [sum(4 * 32 * layer["heads"] + 2 * layer["ffn"] for layer in side) for side in (kept, base)]
    assert 1 - sizes[0] / sizes[1] == pytest.approx(ziplm.target.sparsity, abs=0.02)
    assert report["portable"] and report["pair_sums"]["products"] > layers


def test_onnx_operators(finished, layers):
    """One QAttention per layer, one QuantizeLinear per distinct input, no float product but the head's."""
    found = operators(finished / "onnx" / "model.onnx")
    # The last layer's one query attends by itself.
    assert found["QAttention"] == layers - 1 and found["MultiHeadAttention"] == 1
    assert found["SkipLayerNormalization"] == 0
    # Output projection, FFN up and down of every layer, and the pooler; q, k and v are inside QAttention but there.
    assert found["MatMulIntegerToFloat"] == 3 * layers + 3 + 1
    assert found["QuantizeLinear"] == 4 * layers + 1
    assert found["MatMul"] + found["Gemm"] == 1


def test_onnx_embeddings_are_int8(finished):
    graph = onnx.load(str(finished / "onnx" / "model.onnx")).graph
    kinds = {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
    hidden = json.loads((finished / "model" / "config.json").read_text())["hidden_size"]
    gathered = [kinds[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in kinds]
    tables = [kind for kind, shape in gathered if len(shape) == 2 and shape[1] == hidden]
    assert tables == [onnx.TensorProto.INT8] * 3
    largest = max(np.prod(shape) for kind, shape in kinds.values() if kind == onnx.TensorProto.FLOAT)
    assert largest <= 31_000, "a weight matrix was left in floating point"


def test_onnxruntime_keeps_the_operators(finished, tmp_path, layers):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(finished / "onnx" / "model.onnx"), options, providers=["CPUExecutionProvider"])
    found = operators(tmp_path / "optimised.onnx")
    assert found["SkipLayerNormalization"] == 0
    assert found["LayerNormalization"] == 2 * layers + 1
    assert found["QAttention"] == layers - 1
    assert found["MatMulIntegerToFloat"] == 3 * layers + 3 + 1
    assert found["QuantizeLinear"] == 4 * layers + 1


def test_onnx_runs_without_compressft(finished, report, held_out):
    """Plain onnxruntime and transformers' tokenizer give the accuracy of the report."""
    from transformers import AutoConfig, AutoTokenizer

    folder = finished / "onnx"
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = AutoConfig.from_pretrained(folder).id2label
    right = 0
    for row in held_out:
        encoded = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="np")
        logits = session.run(["logits"], {i.name: encoded[i.name] for i in session.get_inputs()})[0]
        right += labels[int(logits.argmax())] == row["label"]
    assert right / len(held_out) == report["quality"]["onnx"]


@pytest.mark.parametrize("source", [".", "model", "delta", "onnx", "onnx/model.onnx"])
def test_evaluate_agrees_with_the_report(finished, report, held_out, command, tmp_path, source):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": r["text"], "label": r["label"]}) + "\n" for r in held_out))
    code, stdout, _ = command("evaluate", finished / source, "--data", file, "--json")
    result = json.loads(stdout)
    assert code == 0 and result["rows"] == len(held_out)
    assert result["runtime"] == ("onnxruntime" if "onnx" in source else "torch")
    assert result["accuracy"] == report["quality"]["onnx" if "onnx" in source else "torch"]


def test_second_run_is_refused(finished, smoke, command):
    before = fingerprint(finished)
    code, _, stderr = command(*smoke, "--output", finished)
    assert code == 2 and "--resume" in stderr and "Traceback" not in stderr
    assert fingerprint(finished) == before


def test_resume_with_another_recipe_is_refused(finished, smoke, command):
    before = fingerprint(finished)
    code, _, stderr = command(*smoke, "--set", "data.seed=1", "--output", finished, "--resume")
    assert code == 2 and str(finished / "recipe.yaml") in stderr
    assert fingerprint(finished) == before


def test_report_again(copy, report, command):
    for name in ("report.md", "report.html"):
        (copy / "report" / name).unlink()
    code, stdout, _ = command("report", copy)
    assert code == 0 and "banking77-edge" in stdout
    assert json.loads((copy / "report" / "report.json").read_text()) == report
    assert all((copy / "report" / name).stat().st_size for name in ("report.md", "report.html"))


def test_export_again_refuses_training_settings(copy, command):
    before = fingerprint(copy)
    code, _, stderr = command("export", copy, "--set", "stages.0.train.epochs=9")
    assert code == 2 and "export." in stderr
    assert fingerprint(copy) == before


def test_commands_want_a_run_directory(command, tmp_path):
    for name in ("report", "export"):
        code, _, stderr = command(name, tmp_path)
        assert code == 2 and "recipe.yaml" in stderr
