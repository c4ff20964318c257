"""Interrupted runs: killed or stopped anywhere and resumed, they end with the bits of a run that was left alone."""

import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from compressft import cli
from compressft.methods import METHODS
from compressft.model.load import load_model
from compressft.model.saved.manifest import sealed
from compressft.recipe.recipe import load_recipe
from compressft.run.flow import run
from compressft.run.folder import RunFolder
from compressft.run.identity import with_threads
from compressft.run.trainer import CompressionTrainer
from tests import settings
from tests.methods.added import save_adapter
from tests.share import drawn
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

EVERY, TEACHER, STUDENT = 3, 6, 14
STEPS = TEACHER + STUDENT
# Every run is a process of its own; they are forked from one that has imported the libraries already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["compressft.run.flow", "compressft.run.trainer", "compressft.run.report.figures"])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny random BERT with MiniLM's tokenizer, and rows for it."""
    folder = tmp_path_factory.mktemp("resume")
    save_tiny(folder / "base")
    write_jsonl(folder / "train.jsonl", rows_of(60))
    return folder


def write_recipe(base: Path, precision: str) -> Path:
    """Dense teacher, then pruned, quantised and distilled; a checkpoint every few steps."""
    train = {"batch_size": 4, "save": EVERY, "learning_rate": 1e-3, "precision": precision}
    # A rate that does not end at 0, so that one step too many would be seen.
    train["scheduler"] = "constant_with_warmup"
    document = {
        "name": "tiny",
        "model": str(base / "base"),
        "data": {"train": str(base / "train.jsonl"), "max_length": 16},
        "stages": [
            {"name": "teacher", "train": {**train, "max_steps": TEACHER}},
            {
                "name": "student",
                "objectives": [{"type": "distill", "teacher": "teacher", "hidden": 1.0}],
                "passes": [
                    "vocabulary",
                    {"type": "movement", "sparsity": 0.5, "start": 0.0},
                    {"type": "structured", "heads": 0.5, "ffn": 0.5, "align": 8, "floor_ffn": 8, "start": 0.0},
                    {"type": "int8"},
                ],
                "train": {**train, "max_steps": STUDENT},
            },
        ],
        "export": {"enabled": False},
    }
    path = base / f"{precision}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture(scope="module")
def recipe(base) -> Path:
    return write_recipe(base, "fp32")


@pytest.fixture(scope="module")
def reference(recipe) -> Path:
    return undisturbed(recipe)


def undisturbed(recipe: Path) -> Path:
    """The directory of a run that nobody disturbed."""
    folder = recipe.with_suffix("")
    process = start(recipe, folder)
    process.join()
    assert process.exitcode == 0
    return folder


def arguments(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["run", str(recipe), "--output", str(folder), *more]


def start(recipe: Path, folder: Path, *more: str) -> multiprocessing.process.BaseProcess:
    """Start `compressft run` in a process of its own."""
    return launch(arguments(recipe, folder, *more))


def launch(line: list[str]) -> multiprocessing.process.BaseProcess:
    """Start a command line in a process of its own."""
    before, sys.argv = sys.argv, ["compressft", *line]
    try:
        process = PROCESSES.Process(target=cli.main)
        process.start()
    finally:
        sys.argv = before
    return process


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process: (exit code, standard error)."""

    def call(*line: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["compressft", *line])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr().err

    return call


def wait_for(path: Path, alive) -> None:
    """Return as soon as a path exists or the process has ended."""
    while not path.exists() and alive():
        time.sleep(0.002)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    return max((int(p.name.split("-")[1]) for p in folder.glob("checkpoints/step-*")), default=0)


def assert_same(folder: Path, reference: Path) -> None:
    """Shipped tensors bit by bit, the evaluations and what the report says of the model."""
    for name in ("model/model.safetensors", "model/compressft.safetensors", "delta/delta.safetensors"):
        ours, theirs = load_file(folder / name), load_file(reference / name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"
    assert evaluations(folder) == evaluations(reference)
    reports = [json.loads((f / "report" / "report.json").read_text()) for f in (folder, reference)]
    for key in ("quality", "parameters", "size_bytes", "shapes", "recipe_hash"):
        assert reports[0][key] == reports[1][key], key
    for one, other in zip(reports[0]["stages"], reports[1]["stages"], strict=True):
        assert (one["steps"], one["validation"]) == (other["steps"], other["validation"])


def evaluations(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "eval"]


def test_reference_trained_something(reference):
    teacher = load_file(reference / "stages" / "teacher" / "model.safetensors")
    student = load_file(reference / "model" / "model.safetensors")
    assert [row["step"] for row in evaluations(reference)][-1] == STEPS
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert student[name].shape != teacher[name].shape
    assert not torch.equal(student["classifier.weight"], teacher["classifier.weight"])


LEFT = (
    *("checkpoints/.writing/checkpoint-99/model.safetensors", ".model.tmp/x", "stages/.student.tmp/x"),
    *("tmpab12cd34/base.onnx", ".onnx.old/x", ".delta.tmp/x"),
)


def leave_behind(folder: Path) -> None:
    """Half-written files where a kill may leave some."""
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half a file")


def kill_and_resume(recipe: Path, folder: Path, points: list[str]) -> None:
    """Kill a run shortly after each of these paths has appeared, go on after each kill, and let the last one end."""
    draw = random.Random(recipe.stem)
    killed, step = 0, 0
    for point in points:
        process = start(recipe, folder, *(["--resume"] if killed else []))
        wait_for(folder / point, process.is_alive)
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL)
        assert newest(folder) >= step, "a resumed run began before the newest checkpoint"
        step = newest(folder)
        leave_behind(folder)
    assert killed
    process = start(recipe, folder, "--resume")
    process.join()
    assert process.exitcode == 0
    assert not any((folder / name).exists() for name in LEFT)
    # What stood aside for a folder that never came is back.
    assert {path.name for path in folder.iterdir()} == NAMES


NAMES = {".lock", "recipe.yaml", "identity.json", "metrics.jsonl"}
NAMES |= {"checkpoints", "delta", "memo", "model", "onnx", "report", "stages"}


def test_killed_and_resumed(recipe, reference, tmp_path):
    """SIGKILL in the first stage, at its end, in the second stage, and while the run is being saved."""
    points = ["checkpoints/step-3", "stages/teacher", "checkpoints/step-12", "stages/student"]
    kill_and_resume(recipe, tmp_path / "run", points)
    assert_same(tmp_path / "run", reference)


@pytest.mark.full
def test_killed_and_resumed_in_bf16(base, tmp_path):
    recipe = write_recipe(base, "bf16")
    kill_and_resume(recipe, tmp_path / "run", ["checkpoints/step-3", "checkpoints/step-15"])
    assert_same(tmp_path / "run", undisturbed(recipe))


def test_killed_between_the_last_step_and_the_end_of_its_stage(recipe, reference, tmp_path, command):
    """A checkpoint of the last step is complete: resuming trains no step more."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    assert newest(folder) == STEPS
    for name in ("stages/student", "model", "delta", "report"):
        shutil.rmtree(folder / name)
    code, stderr = command(*arguments(recipe, folder, "--resume"))
    assert code == 0, stderr
    assert_same(folder, reference)


def test_resume_of_a_finished_run_changes_nothing(recipe, reference, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    code, stderr = command(*arguments(recipe, folder, "--resume"))
    assert code == 0, stderr
    assert_same(folder, reference)
    before, after = (json.loads((f / "report" / "report.json").read_text()) for f in (reference, folder))
    assert before["training"] == after["training"]
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def interrupted(recipe, tmp_path_factory) -> tuple[Path, str, int]:
    """(directory, standard error, exit code) of a run that a scheduler stopped (SIGTERM) in its second stage."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "compressft", *arguments(recipe, folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(folder / "checkpoints" / f"step-{TEACHER + EVERY}", lambda: process.poll() is None)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate()[1]
    return folder, stderr, process.returncode


@pytest.mark.dear
def test_interrupted_says_how_to_go_on(interrupted, reference, tmp_path):
    folder, stderr, code = interrupted
    assert code == 130 and "Traceback" not in stderr
    stopped = int(re.search(r"stopped at step (\d+) of stage 'student'", stderr).group(1))
    assert EVERY <= stopped < STUDENT
    assert newest(folder) == TEACHER + stopped
    line = shlex.split(stderr.split("Go on with: compressft ", 1)[1])
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    line[line.index(str(folder))] = str(copy)
    # In a process with as many threads as the reference had: their number changes the order of sums.
    process = launch(line)
    process.join()
    assert process.exitcode == 0
    assert_same(copy, reference)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "compressft.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_checkpoint_is_refused(interrupted, recipe, tmp_path, command, name, damage):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0], folder)
    path = folder / "checkpoints" / f"step-{newest(folder)}" / name
    raw = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        # In the manifest a flipped digit of a hash is damage as well.
        spot = raw.rindex(b'"') - 1 if name == "compressft.json" else len(raw) // 2
        path.write_bytes(raw[:spot] + bytes([raw[spot] ^ 1]) + raw[spot + 1 :])
    else:
        path.unlink()
    code, stderr = command(*arguments(recipe, folder, "--resume"))
    assert code == 2 and "Traceback" not in stderr
    # A wrong hash in the manifest shows at the file that it belongs to.
    shown = path.parent if name == "compressft.json" else path
    assert str(shown) in stderr


def fingerprint(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def rotated(raw: bytes) -> bytes:
    """The rows with the label of the next one each."""
    rows = [json.loads(line) for line in raw.splitlines()]
    labels = [row["label"] for row in rows]
    return b"".join(
        json.dumps({**row, "label": label}).encode() + b"\n"
        for row, label in zip(rows, labels[1:] + labels[:1], strict=True)
    )


def flipped(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]


CHANGES = {
    "rotated labels": ("train.jsonl", rotated),
    "a new label": ("train.jsonl", lambda raw: raw.replace(b'"odd"', b'"new"', 1)),
    "weights": ("base/model.safetensors", flipped),
    "configuration": ("base/config.json", lambda raw: raw.replace(b"0.1", b"0.2", 1)),
    "tokenizer": ("base/tokenizer.json", flipped),
}


@pytest.mark.parametrize("case", CHANGES)
def test_other_inputs_are_refused_by_name(interrupted, base, recipe, tmp_path, command, case):
    """Before anything is read or written, by a resume and, where it reads them, by an export."""
    name, change = CHANGES[case]
    shutil.copytree(interrupted[0], tmp_path / "run")
    before, path = fingerprint(tmp_path / "run"), base / name
    raw = path.read_bytes()
    assert change(raw) != raw
    try:
        path.write_bytes(change(raw))
        code, stderr = command(*arguments(recipe, tmp_path / "run", "--resume"))
    finally:
        path.write_bytes(raw)
    assert (
        code == 2 and stderr.startswith(f"error: {path}: has changed since the run began") and stderr.count("\n") == 1
    )
    assert fingerprint(tmp_path / "run") == before


@pytest.mark.parametrize(("name", "refused"), [("train.jsonl", True), ("base/model.safetensors", False)])
def test_an_export_wants_the_data_of_the_run(reference, base, tmp_path, command, name, refused):
    """It reads the base's weights only where the run has no dense stage."""
    folder, path = tmp_path / "run", base / name
    shutil.copytree(reference, folder)
    raw = path.read_bytes()
    try:
        path.write_bytes(flipped(raw))
        code, stderr = command("export", str(folder))
    finally:
        path.write_bytes(raw)
    assert code == (2 if refused else 0), stderr
    assert refused == (f"{path}: has changed since the run began" in stderr)


def test_an_edited_recipe_is_not_the_one_that_was_trained(reference, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    path = folder / "recipe.yaml"
    text = path.read_text()
    before = fingerprint(folder / "report")
    path.write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.002"))
    code, stderr = command("export", str(folder))
    assert code == 2 and f"{path}: is not the recipe that was trained" in stderr
    assert fingerprint(folder / "report") == before
    # Both edited alike: what was trained is recorded next to them.
    code, stderr = command(*arguments(path, folder, "--resume"))
    assert code == 2 and f"{path}: has changed since the run began" in stderr
    (folder / "identity.json").unlink()
    code, stderr = command(*arguments(path, folder, "--resume"))
    assert code == 2 and "stages/teacher: was trained by another recipe" in stderr.replace(str(folder) + "/", "")
    # A remark is no edit, and an export may have settings of its own.
    path.write_text("# mine\n" + text)
    code, stderr = command("export", str(folder), "--set", "export.latency_rounds=1")
    assert code == 0, stderr


def as_of_an_older_version(folder: Path) -> None:
    """Without what earlier versions did not record."""
    (folder / "identity.json").unlink()
    for path in folder.rglob("compressft.json"):
        entry = json.loads(path.read_text())
        entry.pop("recipe_hash", None)
        entry.pop("hash")
        path.write_text(json.dumps(sealed(entry)))


def test_a_run_of_an_older_version_goes_on(interrupted, recipe, reference, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0], folder)
    as_of_an_older_version(folder)
    process = start(recipe, folder, "--resume")
    process.join()
    assert process.exitcode == 0
    assert_same(folder, reference)
    as_of_an_older_version(folder)
    leave_behind(folder)
    code, stderr = command("export", str(folder))
    assert code == 0 and "cannot be compared" in stderr, stderr
    assert not any((folder / name).exists() for name in LEFT)


def test_a_disk_that_holds_what_is_left_is_enough(reference, recipe, tmp_path, command, monkeypatch):
    """All steps are trained: a resume asks for what it writes, and hardly more."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    for name in ("model", "delta", "report"):
        shutil.rmtree(folder / name)
    left = sum(p.stat().st_size for name in ("model", "delta") for p in (reference / name).glob("*.safetensors"))
    for free, enough in ((2 * left, True), (left // 2, False)):
        monkeypatch.setattr(
            "compressft.run.folder.shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        code, stderr = command(*arguments(recipe, folder, "--resume"))
        assert code == (0 if enough else 2), stderr
        if enough:
            assert_same(folder, reference)
            shutil.rmtree(folder / "model")
            shutil.rmtree(folder / "delta")
    assert "what is left to write needs about" in stderr


@pytest.mark.parametrize("name", ["checkpoints", "report", "stages", "model", "delta", "metrics.jsonl"])
def test_links_out_of_a_run_are_not_followed(reference, recipe, tmp_path, command, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    shutil.copytree(reference, folder)
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    before = fingerprint(tmp_path)
    for line in (arguments(recipe, folder, "--resume"), ["export", str(folder)], ["report", str(folder)]):
        code, stderr = command(*line)
        assert code == 2 and f"error: {folder / name}: is a symbolic link to {outside}" in stderr, stderr
        assert stderr.count("\n") == 1
    assert fingerprint(tmp_path) == before


def test_damaged_stage_is_refused(interrupted, recipe, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0], folder)
    path = folder / "stages" / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    code, stderr = command(*arguments(recipe, folder, "--resume"))
    assert code == 2 and str(path) in stderr


def test_two_runs_into_one_directory_are_refused(interrupted, recipe, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(interrupted[0], folder)
    with RunFolder(folder, load_recipe(recipe), resume=True):
        code, stderr = command(*arguments(recipe, folder, "--resume"))
    assert code == 2 and "another run" in stderr


def test_resume_wants_the_same_recipe(interrupted, recipe, command):
    code, stderr = command(*arguments(recipe, interrupted[0], "--set", "stages.student.train.seed=5", "--resume"))
    assert code == 2 and "recipe.yaml" in stderr


# Methods.

# Gates that draw noise.
FIELDS = {**settings.METHODS, "head_gates": {"end": 0.6}}


def fields_of(name: str, base: Path) -> dict[str, Any]:
    """A method's settings here; the adapters and the side network that two of them read are saved first."""
    if name == "side":
        return {"network": str(base / "base")}
    if name == "fusion":
        folders = [base / "adapters" / str(i) for i in (0, 1)]
        for i, folder in enumerate(folders):
            if not folder.exists():
                save_adapter(folder, lambda: load_classifier(base), seed=i)
        return {"adapters": [str(folder) for folder in folders]}
    return FIELDS[name]


def load_classifier(base: Path) -> Any:
    return load_model(str(base / "base"), "AutoModelForSequenceClassification", num_labels=2)


def write_method(base: Path, name: str) -> Path:
    """One stage of a method, a checkpoint at every step."""
    train = {"batch_size": 4, "save": 1, "learning_rate": 1e-3, "precision": "fp32", "max_steps": 5}
    document = {
        "name": name,
        "model": str(base / "base"),
        "data": {"train": str(base / "train.jsonl"), "max_length": 16},
        "stages": [{"name": "only", "method": {"type": name, **fields_of(name, base)}, "train": train}],
        "export": {"enabled": False},
    }
    path = base / f"method-{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class Killed(BaseException):
    """What no handler of a run catches."""


@pytest.mark.dear
@pytest.mark.parametrize("name", drawn(3, METHODS))
def test_every_method_goes_on_where_it_was_killed(name, base, tmp_path, monkeypatch):
    """Stopped behind a random step by what nobody handles, without a chance to save."""
    recipe = load_recipe(write_method(base, name))
    quiet = Console(quiet=True)
    run(recipe, tmp_path / "whole", console=quiet)
    stop = random.Random(name).randrange(2, 5)
    trained = CompressionTrainer.training_step

    def until(self, *arguments, **more):
        if self.state.global_step == stop:
            raise Killed
        return trained(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(CompressionTrainer, "training_step", until)
        with pytest.raises(Killed):
            run(recipe, tmp_path / "run", console=quiet)
    assert newest(tmp_path / "run") == stop
    run(recipe, tmp_path / "run", resume=True, console=quiet)
    for whole in tmp_path.glob("whole/[md]*/*.safetensors"):
        ours, theirs = load_file(tmp_path / "run" / whole.parent.name / whole.name), load_file(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), whole.name
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


@pytest.fixture
def small(base) -> Path:
    """A recipe whose sums are large enough for several threads, a checkpoint at every step."""
    save_tiny(base / "wide", hidden_size=64, intermediate_size=256)
    train = {"batch_size": 16, "save": 1, "learning_rate": 1e-3, "precision": "fp32", "max_steps": 2}
    changes = {"stages": [{"name": "only", "train": train}], "export": {"enabled": False}}
    path = base / "small.yaml"
    path.write_text(json.dumps(document(base / "wide", base / "train.jsonl", **changes)))
    return path


def test_a_resumed_run_computes_with_the_threads_of_its_beginning(reference, recipe, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path / "run")
    path, found, before = tmp_path / "run" / "identity.json", [], torch.get_num_threads()
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "threads": before + 2})))

    def seen(*arguments):
        found.append(torch.get_num_threads())
        raise Killed

    monkeypatch.setattr("compressft.run.flow.load_feeds", seen)
    with pytest.raises(Killed):
        run(load_recipe(recipe), tmp_path / "run", resume=True, console=Console(quiet=True))
    assert found == [before + 2] and torch.get_num_threads() == before


@pytest.mark.full
def test_other_threads_go_on_with_the_same_bits(small, tmp_path, monkeypatch):
    """Their number decides the order of sums: a resumed run takes over that of its beginning."""
    recipe, quiet = load_recipe(small), Console(quiet=True)
    trained = CompressionTrainer.training_step

    def until(self, *arguments, **more):
        if self.state.global_step == 1:
            raise Killed
        return trained(self, *arguments, **more)

    for threads, name in ((1, "one"), (2, "two")):
        with with_threads(threads):
            run(recipe, tmp_path / name, console=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(CompressionTrainer, "training_step", until)
        with with_threads(2), pytest.raises(Killed):
            run(recipe, tmp_path / "run", console=quiet)
    done = subprocess.run(
        [sys.executable, "-m", "compressft", *arguments(small, tmp_path / "run", "--resume")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "goes on with 2 threads, as it began (1 were set" in done.stderr
    one, two, ours = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two", "run"))
    assert any(not torch.equal(one[key], two[key]) for key in two), "the number of threads decides nothing here"
    assert all(torch.equal(ours[key], two[key]) for key in two)
