"""The command line: a mistake is one line on standard error and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from onnx import TensorProto, helper, save

import compressft
from compressft.modules.families import FAMILIES
from compressft.recipe.document import shipped_recipes
from compressft.recipe.recipe import load_recipe, parse_recipe
from tests.command_line import Done
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(tmp_path, model):
    """Writes a recipe file; changes are top-level fields."""

    def recipe(**changes) -> Path:
        data = write_jsonl(tmp_path / "rows.jsonl", rows_of(40))
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(document(model, data) | changes))
        return path

    return recipe


# What a run says before it loads the model.
ROW_COUNTS = "tiny: 36 train, 4 validation, 0 test rows\n"


def said(done: Done, first: str = "") -> str:
    """What a user's mistake prints: one line (after `first`, where the run has begun)."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith(first)
    done = done._replace(err=done.err.removeprefix(first))
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    return done.err.removeprefix("error: ").rstrip("\n")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# Real processes.


def process(*arguments: str | Path, cwd: Path) -> Done:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "compressft", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    return Done(done.returncode, done.stdout, done.stderr)


def test_process_refuses_an_unknown_recipe(tmp_path):
    message = said(process("run", "banking77-egde", cwd=tmp_path))
    assert "did you mean 'banking77-edge'?" in message
    assert contents(tmp_path) == {}


def test_a_missing_data_file_leaves_nothing_behind(tmp_path, recipe, call):
    path = recipe()
    before = contents(tmp_path)
    message = said(call("run", path, "--output", "out", "--set", "data.train=rows.json"))
    assert "'rows.json' does not exist (did you mean 'rows.jsonl'?)" in message
    assert contents(tmp_path) == before


def test_a_directory_below_a_file_leaves_nothing_behind(tmp_path, recipe, call):
    path = recipe()
    before = contents(tmp_path)
    message = said(call("run", path, "--output", tmp_path / "rows.jsonl" / "out"))
    assert message.startswith(f"--output '{tmp_path / 'rows.jsonl' / 'out'}': cannot be written to: ")
    assert contents(tmp_path) == before


def test_process_says_its_version(tmp_path):
    done = process("--version", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, f"compressft {compressft.__version__}\n", "")


# Recipes.


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.max_lenght=3", ["data.max_lenght: unknown field", "did you mean 'max_length'?"]),
        ("stages.0.passes=[{type: structured, heads: 1.0}]", ["structured.heads", "less than 1", "(got 1.0)"]),
        ("stages.0.passes=[int8, int8]", ["given twice"]),
        ("stages.last.train.epochs=1", ["no item 'last'; items: only"]),
        ("epochs", ["--set 'epochs': wants PATH=VALUE"]),
        ("data={train: nowhere.jsonl}", ["'nowhere.jsonl' does not exist"]),
        ("data.columns.label=intent", ["no column 'intent' for 'label'; columns: text, label"]),
        ("task=regression", ["no column 'score'"]),
        ("model=./no-such-model", ["model", "'./no-such-model'", "does not exist", "minilm"]),
        ("model=no-such-owner/no-such-model", ["model", "'no-such-owner/no-such-model'"]),
        ("model=a/b/c", ["model", "'a/b/c'"]),
    ],
)
def test_mistakes_in_a_recipe(call, tmp_path, recipe, command, override, parts):
    path = recipe()
    before = contents(tmp_path)
    output = ["--output", "out"] if command == "run" else []
    message = said(call(command, path, *output, "--set", override))
    for part in parts:
        assert part in message
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["run", "plan"])
def test_unknown_model_family_names_the_known_ones(call, tmp_path, recipe, command):
    albert = save_tiny(tmp_path / "albert", "albert", embedding_size=16)
    path = recipe(model=str(albert))
    before = contents(tmp_path)
    output = ["--output", "out"] if command == "run" else []
    message = said(call(command, path, *output), ROW_COUNTS if command == "run" else "")
    assert "albert" in message
    for family in FAMILIES:
        assert family in message
    assert contents(tmp_path) == before


def test_rows_that_are_broken_name_their_line_as_it_is(call, tmp_path, recipe):
    """Line 100 stays a number: rich would print ":100:" as an emoji, and "[x]" as a style."""
    path = recipe()
    folder = tmp_path / "[red]"
    folder.mkdir()
    rows = write_jsonl(folder / "rows.jsonl", rows_of(99))
    rows.write_text(rows.read_text() + "{oops\n")
    message = said(call("plan", path, "--set", f"data.train='{rows}'"))
    assert f"{rows}:100: is not JSON" in message


@pytest.mark.parametrize("memory", ["nonsense", "1.2.3GiB", "-3GiB"])
def test_memory_that_is_none(call, recipe, memory):
    assert "wants a size such as 8GiB" in said(call("plan", recipe(), f"--memory={memory}"))


def test_hub_data_set_without_network(call, recipe):
    assert "could not be loaded" in said(call("plan", recipe(), "--set", "data.dataset=no-such-owner/no-such-data"))


# Run directories.


def test_mistake_found_after_the_directory_was_claimed_gives_it_back(call, tmp_path, recipe):
    path = recipe()
    made = tmp_path / "made"
    made.mkdir()
    before = contents(tmp_path)
    # The method's fields are checked against the model that is loaded by then.
    override = ("--set", "stages.0.method={type: layers, top: 7}", "--set", "export.latency_shapes=[[1, 16]]")
    for output in ("made", "new/out"):
        assert "7 layers asked for; the model has 2" in said(
            call("run", path, "--output", output, *override), ROW_COUNTS
        )
    after = contents(tmp_path)
    after.pop("new")
    assert after == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.latency_shapes=[[1, 64]]", "1x64 has more tokens than the model's 40 positions"),
        ("data.max_length=64", "tokens, the model 40 positions"),
        ("task=causal-lm", "sees later tokens"),
    ],
)
def test_what_the_model_cannot_take_is_said_before_training(call, tmp_path, recipe, override, message):
    long = write_jsonl(
        tmp_path / "long.jsonl", [{"text": " ".join(["river"] * (30 + i)), "label": str(i % 2)} for i in range(20)]
    )
    more = ("--set", f"data.train={long}") if "max_length" in override else ()
    done = call("run", recipe(), "--output", "out", *more, "--set", override)
    assert message in done.err and done.code == 2 and not (tmp_path / "out").exists(), done


def test_directory_that_is_not_empty(call, tmp_path, recipe):
    path = recipe()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    before = contents(tmp_path)
    for options in ([], ["--resume"]):
        message = said(call("run", path, "--output", "out", *options))
        assert "'out': is not empty ('thesis.txt')" in message
    assert contents(tmp_path) == before


def test_directory_that_holds_a_run(call, tmp_path, recipe):
    path = recipe()
    (tmp_path / "out").mkdir()
    other = parse_recipe(yaml.safe_load(path.read_text()) | {"name": "other"})
    (tmp_path / "out" / "recipe.yaml").write_text(other.to_yaml())
    (tmp_path / "out" / ".lock").touch()
    before = contents(tmp_path)
    assert "holds a run already; add --resume" in said(call("run", path, "--output", "out"))
    message = said(call("run", path, "--output", "out", "--resume"))
    assert other.hash[:19] in message
    assert load_recipe(path).hash[:19] in message
    assert contents(tmp_path) == before


def test_directory_in_use(call, tmp_path, recipe):
    path = recipe()
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"):
        before = contents(tmp_path)
        assert "another run is writing there" in said(call("run", path, "--output", "out"))
        assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["report", "export"])
def test_directory_that_is_no_run(call, tmp_path, command):
    (tmp_path / "folder").mkdir()
    for name in ("folder", "nowhere"):
        assert f"'{name}': is no run directory" in said(call(command, name))
    (tmp_path / "folder" / "recipe.yaml").write_text("name: x\n")
    assert "its training is not finished" in said(call(command, "folder"))
    assert contents(tmp_path).keys() == {"folder", "folder/recipe.yaml"}


def test_export_sets_nothing_but_export(call):
    assert "only export.* can be set here" in said(call("export", "anything", "--set", "data.seed=1"))


# Evaluate.


def test_evaluate_of_what_is_not_ours(call, tmp_path, model):
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(4))
    before = contents(tmp_path)
    assert "has no compressft.json" in said(call("evaluate", model, "--data", data))
    assert "'nowhere' does not exist" in said(call("evaluate", "nowhere", "--data", data))
    assert "has no compressft.json" in said(call("evaluate", data, "--data", data))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("manifest", "part"), [("{}", "field 'kind' is missing"), ("{oops", "is not JSON")])
def test_evaluate_of_a_broken_folder(call, tmp_path, manifest, part):
    (tmp_path / "compressft.json").write_text(manifest)
    assert part in said(call("evaluate", tmp_path, "--data", "rows.jsonl"))


def test_evaluate_without_data(call, tmp_path, model):
    info = {
        "kind": "onnx",
        "task": "sequence-classification",
        "max_length": 8,
        "labels": ["a"],
        "columns": {},
        "files": {},
    }
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "compressft.json").write_text(json.dumps(info))
    assert "'rows.jsonl' does not exist" in said(call("evaluate", tmp_path, "--data", "rows.jsonl"))


# Benchmarks.


def test_benchmark_of_missing_and_broken_files(call, tmp_path, recipe):
    assert "'nowhere.onnx' does not exist" in said(call("benchmark", "edge", "nowhere.onnx"))
    (tmp_path / "file.onnx").write_text("text")
    assert "wants BATCHxLENGTH" in said(call("benchmark", "edge", "file.onnx", "--shape", "8"))
    assert "file.onnx" in said(call("benchmark", "edge", "file.onnx", "--shape", "1x8", "--rounds", "1"))
    assert "did you mean 'data'?" in said(call("benchmark", "training", recipe(), "--set", "date=1"))


def test_benchmark_checks_where_its_rows_go_before_it_measures(call):
    assert "--json 'no/rows.json'" in said(call("benchmark", "edge", "nowhere.onnx", "--json", "no/rows.json"))
    assert "--json '.'" in said(call("benchmark", "edge", "nowhere.onnx", "--json", "."))
    assert "--json '.'" in said(call("benchmark", "ops", "--json", "."))


def test_benchmark_of_operators_that_cannot_be_measured(call, tmp_path, monkeypatch):
    message = said(call("benchmark", "ops", "--only", "adapter", "--only", "sorting"))
    assert "--only 'sorting': is no operator; there are adapter, masked_linear, " in message
    assert "--device 'tpu': wants cpu or cuda" in said(call("benchmark", "ops", "--device", "tpu"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda: torch finds no GPU" in said(call("benchmark", "ops", "--device", "cuda"))
    assert contents(tmp_path) == {}


def test_benchmark_of_operators(call, tmp_path, monkeypatch):
    from compressft_kernels.benchmark import shapes

    monkeypatch.setattr(shapes, "checks", lambda checks=shapes.checks: checks()[::9])
    done = call("benchmark", "ops", "--device", "cpu", "--quick", "--only", "adapter", "--json", "rows.json")
    assert done.code == 0
    assert done.err.splitlines()[0] == "checking against float64"
    assert done.err.splitlines()[-1] == "adapter 2x32 d96 r16, forward+backward"
    title, head, *rows = done.out.splitlines()
    assert title == "adapter" and head.split()[:3] == ["case", "pass", "ms"]
    assert len(rows) == 2 and all(row.split()[:3] == ["2x32", "d96", "r16"] for row in rows)
    document = json.loads((tmp_path / "rows.json").read_text())
    assert [row["pass"] for row in document["rows"]] == ["forward", "forward+backward"]
    assert document["wrong"] == {} and {row["operation"] for row in document["correctness"]} == {"adapter"}


def test_benchmark_says_which_operator_is_wrong(call, monkeypatch):
    from compressft_kernels.benchmark import correctness

    monkeypatch.setattr(correctness, "FACTOR", -1e6)
    done = call("benchmark", "ops", "--device", "cpu", "--quick", "--only", "masked_linear")
    assert done.code == 1
    assert "\nwrong: masked_linear: " in done.out
    assert not re.search(r"\dx ", done.out)
    assert done.out.count(" wrong ") == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_full_disk_is_one_line(call, tmp_path):
    value = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])
    output = helper.make_tensor_value_info("logits", TensorProto.INT64, ["b", "t"])
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["logits"])], "g", [value], [output])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "model.onnx")
    done = call("benchmark", "edge", "model.onnx", "--shape", "1x4", "--rounds", "1", "--json", "/dev/full")
    assert done.code == 2
    assert "model.onnx" in done.out
    assert done.err.startswith("error: No space left on device; free some space")
    assert done.err.count("\n") == 1


# Usage, and what is no error.


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run"],
        ["run", "banking77-edge", "--nonsense"],
        ["evaluate", "x"],
        ["benchmark", "edge"],
        ["benchmark", "edge", "x", "--threads", "0"],
        ["benchmark", "edge", "x", "--rounds", "0"],
        ["benchmark", "training", "x", "--steps", "0"],
        ["benchmark", "training", "x", "--steps", "many"],
        ["benchmark", "ops", "adapter"],
    ],
)
def test_wrong_usage(call, tmp_path, arguments):
    done = call(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Traceback" not in done.err
    assert "Usage:" in done.err
    assert contents(tmp_path) == {}


def test_recipes_are_listed_on_a_line_each(call):
    done = call("recipes")
    assert (done.code, done.err) == (0, "")
    listed = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert listed == {name: load_recipe(name).description for name in shipped_recipes()}


def test_schema_is_printed_as_json(call):
    done = call("schema")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["properties"].keys() >= {"name", "model", "data", "stages", "extends"}


def test_analyses_want_what_they_compare(call):
    assert "analysis 'closness' is not known" in said(call("analyse", "a", "b", "--type", "closness"))
    assert "compares 2 models; got 1" in said(call("analyse", "a", "--type", "closeness"))
    assert "'base' is that of a run directory" in said(call("analyse", "base", "b", "--type", "closeness"))
    wrong = call("analyse", "a", "b", "--type", "closeness", "--set", "modles=1")
    assert "analysis closeness.modles: unknown field" in said(wrong)


def test_environment_is_printed(call):
    done = call("env")
    assert (done.code, done.err) == (0, "")
    assert {"python", "torch", "device", "precision", "kernels"} <= {line.split()[0] for line in done.out.splitlines()}


def test_plan_is_printed(call, recipe):
    done = call("plan", recipe(), "--memory", "64GiB")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["only", "saving", "export", "peak", "budget 65536 MiB"]
    assert lines[-1].endswith("fits")


def test_a_fault_of_ours_is_not_passed_off_as_the_users(call, tmp_path, monkeypatch):
    """Anything but a UserError and what the machine refuses keeps its traceback, and Python's exit code 1."""

    def fault(*arguments):
        raise KeyError("of ours")

    monkeypatch.setattr("compressft.recipe.recipe.load_recipe", fault)
    with pytest.raises(KeyError):
        call("plan", "banking77-edge")
