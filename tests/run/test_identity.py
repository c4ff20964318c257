"""What a run is made of: any other byte of what it reads is refused by name, other versions are said."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.model.saved.manifest import sealed
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.recipe import Recipe, parse_recipe
from compressft.run import identity
from compressft.run.identity import FILE, identify, inputs, refuse_changed, with_threads

# What stands at the places that a recipe may name; nothing here opens them.
FILES = {
    "train.jsonl": "rows",
    "more.jsonl": "more rows",
    "validation.jsonl": "others",
    "test.csv": "rest",
    "texts.txt": "texts",
    "words.txt": "words",
    "base/config.json": "{}",
    "base/model.safetensors": "weights",
    "base/tokenizer.json": "pieces",
    "base/vocab.txt": "pieces",
    "teacher/config.json": "{}",
    "teacher/pytorch_model.bin": "weights",
    "one/adapter_config.json": "{}",
    "one/adapter_model.safetensors": "weights",
    "two/delta.safetensors": "weights",
    "two/compressft.json": "{}",
    "side/model.safetensors": "weights",
}
# Next to them, and read by nobody.
OTHERS = ("base/README.md", "base/pytorch_model.bin", "base/onnx/config.json", "base/.gitattributes", "teacher/x.h5")


def write(root: Path) -> None:
    for name in (*FILES, *OTHERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(FILES.get(name, name))


def recipe_of(root: Path) -> Recipe:
    taught = {"type": "distill", "teacher": str(root / "teacher")}
    stages = [
        {"name": "first", "method": {"type": "fusion", "adapters": [str(root / "one")]}, "objectives": [taught]},
        {"name": "second", "method": {"type": "adapter", "placement": "pfeiffer", "stack": [str(root / "two")]}},
        {"name": "third", "passes": [{"type": "vocabulary", "reserve_file": str(root / "words.txt")}]},
        {"name": "fourth", "method": {"type": "side", "network": str(root / "side")}},
        {"name": "fifth", "objectives": [{"type": "distill", "teacher": "first"}]},
    ]
    train = [str(root / "train.jsonl"), str(root / "more.jsonl")]
    rest = {"validation": "validation.jsonl", "test": "test.csv", "unlabelled": "texts.txt"}
    data = {"train": train, **{split: str(root / name) for split, name in rest.items()}}
    return parse_recipe({"name": "r", "model": str(root / "base"), "data": data, "stages": stages})


def begin(root: Path, recipe: Recipe) -> Path:
    """A run directory in which a run has begun."""
    run = root / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    go_on(run, recipe)
    return run


def go_on(run: Path, recipe: Recipe) -> str:
    """What is said."""
    out = io.StringIO()
    identify(run, recipe, Console(file=out, width=10_000))
    return out.getvalue()


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> tuple[Path, Path, Recipe]:
    """(folder of what is read, run directory, recipe) of a run that has begun."""
    root = tmp_path_factory.mktemp("identity")
    write(root)
    recipe = recipe_of(root)
    return root, begin(root, recipe), recipe


def test_every_file_that_is_read_is_recorded_and_no_other(begun):
    root, run, recipe = begun
    assert {one.shown for one in inputs(recipe)} == {str(root / name) for name in FILES}
    recorded = json.loads((run / FILE).read_text())["inputs"]
    assert len(recorded) == len(FILES) and "model/tokenizer.json" in recorded and "data.train.1" in recorded
    assert go_on(run, recipe) == ""


@given(name=st.sampled_from(sorted(FILES)), place=st.integers(0, 100), flipped=st.integers(1, 255))
@settings(max_examples=40)
def test_any_byte_of_any_file_is_refused_by_name(begun, name, place, flipped):
    root, run, recipe = begun
    then, path = identity.read(run), root / name
    before = path.read_bytes()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    at = place % len(before)
    try:
        path.write_bytes(before[:at] + bytes([before[at] ^ flipped]) + before[at + 1 :])
        # A time of change that was set back hides nothing.
        os.utime(path, ns=times)
        with pytest.raises(UserError, match="has changed since the run began") as caught:
            refuse_changed(then, recipe)
    finally:
        path.write_bytes(before)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    refuse_changed(then, recipe)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(begun, name):
    root, run, recipe = begun
    aside = (root / name).rename(root / "aside")
    try:
        with pytest.raises(UserError, match=rf"^{root / name}: is missing, and the run began with it"):
            go_on(run, recipe)
    finally:
        aside.rename(root / name)


@pytest.mark.parametrize("name", ["base/added_tokens.json", "base/adapter_config.json", "teacher/model.safetensors"])
def test_a_file_that_loaders_would_read_besides_is_named(begun, name):
    root, run, recipe = begun
    (root / name).write_text("{}")
    try:
        with pytest.raises(UserError, match=rf"^{root / name}: was not there when the run began"):
            go_on(run, recipe)
    finally:
        (root / name).unlink()


def test_what_nobody_reads_may_change(begun):
    root, run, recipe = begun
    for name in OTHERS:
        (root / name).write_text("changed")
    (root / "base" / "notes.md").write_text("new")
    for name in FILES:
        (root / name).touch()
    assert go_on(run, recipe) == ""


def test_the_same_bytes_elsewhere_are_the_same(begun, tmp_path):
    root, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    for name in ("base", "train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, tmp_path / name)
    data = {**json.loads(recipe.data.model_dump_json()), "train": [str(tmp_path / "train.jsonl")] * 1}
    data["train"].append(str(root / "more.jsonl"))
    moved = parse_recipe({**json.loads(recipe.model_dump_json()), "model": str(tmp_path / "base"), "data": data})
    assert go_on(tmp_path / "run", moved) == ""


def test_a_finished_stages_teacher_may_go(begun, tmp_path):
    root, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "stages" / "first").mkdir(parents=True)
    aside = (root / "teacher").rename(root / "aside")
    try:
        assert go_on(tmp_path / "run", recipe) == ""
    finally:
        aside.rename(root / "teacher")


def test_an_edited_recipe_is_refused(begun, tmp_path):
    _, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(f"# a remark\n{path.read_text()}")
    assert go_on(tmp_path / "run", recipe) == ""
    path.write_text(path.read_text().replace("epochs: 3.0", "epochs: 4.0", 1))
    with pytest.raises(UserError, match=rf"^{path}: has changed since the run began"):
        go_on(tmp_path / "run", recipe)


def test_the_record_is_protected_too(begun, tmp_path):
    _, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / FILE
    entry = json.loads(path.read_text())
    for changes in ({"threads": 3}, {"inputs": {}}, {"about": {}}, {"recipe": "sha256:0"}):
        path.write_text(json.dumps({**entry, **changes}))
        with pytest.raises(UserError, match=rf"^{path}: was changed after it was written"):
            go_on(tmp_path / "run", recipe)
    for text, said in (("{", "is not JSON"), ("[]", "wants a JSON object"), ("{}", "is missing")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            go_on(tmp_path / "run", recipe)
    del entry["hash"]
    path.write_text(json.dumps(entry))
    with pytest.raises(UserError, match="field 'hash' is missing"):
        go_on(tmp_path / "run", recipe)
    path.write_text(json.dumps(sealed({**entry, "format": 2})))
    with pytest.raises(UserError, match="format 2; this compressft reads 1"):
        go_on(tmp_path / "run", recipe)


def test_a_run_of_an_older_version_goes_on_and_is_recorded_from_then_on(begun, tmp_path):
    _, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()
    (tmp_path / "run" / "checkpoints").mkdir()
    said = go_on(tmp_path / "run", recipe)
    assert "whether they have changed since cannot be compared" in said and said.count("\n") == 1
    assert go_on(tmp_path / "run", recipe) == ""


def test_other_versions_are_one_line(begun, tmp_path):
    _, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / FILE
    entry = json.loads(path.read_text())
    about = {**entry["about"], "torch": "1.0", "cpu": "abacus", "gone": "7"}
    path.write_text(json.dumps(sealed({**entry, "about": about})))
    said = go_on(tmp_path / "run", recipe)
    assert said.count("\n") == 1 and f"torch {torch.__version__.partition('+')[0]}" in said
    assert "(1.0)" in said and "(abacus)" in said and "gone none (7)" in said and "transformers" not in said


def test_the_threads_of_the_beginning_are_taken_over(begun, tmp_path):
    _, run, recipe = begun
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / FILE
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "threads": 3})))
    assert "goes on with 3 threads, as it began" in go_on(tmp_path / "run", recipe)
    before = torch.get_num_threads()
    with with_threads(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_a_data_set_of_the_hub_is_its_content(tmp_path):
    import datasets

    def save(labels):
        shutil.rmtree(tmp_path / "local", ignore_errors=True)
        (tmp_path / "local").mkdir()
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
        )
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "local" / "train.parquet")

    write(tmp_path)
    save([0, 1])
    data = {"dataset": str(tmp_path / "local")}
    recipe = parse_recipe({"name": "r", "model": str(tmp_path / "base"), "data": data, "stages": [{"name": "one"}]})
    run = begin(tmp_path, recipe)
    # Written again, with a time of its own, it is the same.
    save([0, 1])
    assert go_on(run, recipe) == ""
    save([1, 0])
    with pytest.raises(UserError, match=rf"^data.dataset: '{tmp_path / 'local'}': has changed since the run began"):
        go_on(run, recipe)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The cache of a model on the hub, at its revision "a"."""
    monkeypatch.setattr(identity, "_cached", lambda name, file: found(tmp_path / "hub", file))
    revision(tmp_path / "hub", "a")
    return tmp_path / "hub"


def revision(hub: Path, name: str, **changes: str) -> None:
    """The hub moves on to another revision."""
    files = {"config.json": "{}", "model.safetensors": "weights", "README.md": name, **changes}
    (hub / "snapshots" / name).mkdir(parents=True)
    (hub / "ref").write_text(name)
    for file, text in files.items():
        (hub / "snapshots" / name / file.replace("_", ".")).write_text(text)


def found(hub: Path, file: str) -> Path | None:
    path = hub / "snapshots" / (hub / "ref").read_text() / file
    return path if path.is_file() else None


def test_a_model_of_the_hub_is_its_revision_or_the_same_files_of_another(tmp_path, hub):
    write(tmp_path)
    data = {"train": str(tmp_path / "train.jsonl")}
    recipe = parse_recipe({"name": "r", "model": "owner/model", "data": data, "stages": [{"name": "one"}]})
    run = begin(tmp_path, recipe)
    assert json.loads((run / FILE).read_text())["inputs"]["model"] == "revision:a"
    revision(hub, "b")
    assert go_on(run, recipe) == ""
    revision(hub, "c", model_safetensors="others")
    with pytest.raises(UserError, match=r"^model: 'owner/model' \(on the hub\): has changed since the run began"):
        go_on(run, recipe)
    revision(hub, "d")
    shutil.rmtree(hub / "snapshots" / "a")
    with pytest.raises(UserError, match="has changed since the run began"):
        go_on(run, recipe)


def test_a_model_that_is_not_on_the_hub_is_left_to_its_loader(tmp_path):
    write(tmp_path)
    for name in ("no-such-owner/no-such-model", str(tmp_path / "nowhere"), "no such name", "a/b/c"):
        recipe = parse_recipe(
            {
                "name": "r",
                "model": name,
                "data": {"train": str(tmp_path / "train.jsonl")},
                "stages": [{"name": "one"}],
            }
        )
        assert [one.key for one in inputs(recipe) if one.digest(None) is not None] == ["data.train.0"]


def test_only_what_is_read_is_compared(begun):
    root, run, recipe = begun
    done, then = [stage.name for stage in recipe.stages], identity.read(run)
    path = root / "base" / "model.safetensors"
    path.rename(root / "aside")
    try:
        refuse_changed(then, recipe, done, lambda key: key.startswith(("data.", "model/config.json")))
        with pytest.raises(UserError, match=rf"^{path}: is missing"):
            refuse_changed(then, recipe, done)
    finally:
        (root / "aside").rename(path)


@pytest.mark.parametrize("kind", [*METHODS.values(), *OBJECTIVES.values(), *PASSES.values()])
def test_every_field_that_names_files_is_an_input(kind):
    """A field for a file or folder is one that `inputs` gives; words of other meanings are not."""
    words = {"exclude", "reserve", "initial", "pattern", "type"}
    named = [
        name
        for name, field in kind.model_fields.items()
        if str(field.annotation) in ("<class 'str'>", "str | None", "tuple[str, ...]") and name not in words
    ]
    for name in named:
        value = ("place",) if "tuple" in str(kind.model_fields[name].annotation) else "place"
        required = {} if kind.__name__ != "Adapter" else {"placement": "pfeiffer"}
        assert list(kind.model_validate({**required, name: value}).inputs()) == ["place"], name
