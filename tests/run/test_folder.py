"""The run directory: who may write there, what a checkpoint must be, what the log forgets."""

import errno
import json
import os
from pathlib import Path

import pytest
import yaml

from compressft.errors import UserError
from compressft.recipe.recipe import Recipe, parse_recipe
from compressft.run.folder import RunFolder


def recipe(seed: int = 0) -> Recipe:
    return parse_recipe(
        {
            "name": "r",
            "model": "minilm",
            "data": {"sample": "banking77"},
            "stages": [{"name": "one", "train": {"seed": seed}}],
        }
    )


def publish(folder: RunFolder, step: int, keep: int = 2, stage: str = "one", content: bytes = b"weights") -> Path:
    written = folder.staging / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "model.safetensors").write_bytes(content)
    return folder.publish(written, step, {"stage": stage, "seconds": 1.0}, keep)


def test_recipe_is_written_and_claimed(tmp_path):
    with RunFolder(tmp_path / "a" / "b", recipe(), resume=False) as folder:
        assert parse_recipe(yaml.safe_load((folder.root / "recipe.yaml").read_text())) == recipe()
    with pytest.raises(UserError, match="--resume"):
        RunFolder(tmp_path / "a" / "b", recipe(), resume=False)
    with RunFolder(tmp_path / "a" / "b", recipe(), resume=True):
        pass
    with pytest.raises(UserError, match="wants the recipe of the run"):
        RunFolder(tmp_path / "a" / "b", recipe(seed=1), resume=True)


def test_resume_of_nothing_starts(tmp_path):
    """So that one command line can be repeated until the run is done."""
    with RunFolder(tmp_path / "new", recipe(), resume=True) as folder:
        assert (folder.root / "recipe.yaml").is_file()
        assert folder.newest("one") is None and folder.finished("one") is None


def test_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"not empty \('thesis.tex'\)"):
            RunFolder(tmp_path, recipe(), resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


def test_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="cannot be written to"):
        RunFolder(tmp_path / "run", recipe(), resume=False)


def test_lock_is_held_and_given_back(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False), pytest.raises(UserError, match="another run is writing there"):
        RunFolder(tmp_path, recipe(), resume=True)
    RunFolder(tmp_path, recipe(), resume=True).__exit__(None, None, None)


def test_refused_claim_gives_the_lock_back(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False):
        pass
    with pytest.raises(UserError):
        RunFolder(tmp_path, recipe(), resume=False)
    with RunFolder(tmp_path, recipe(), resume=True):
        pass


def test_newest_checkpoints_are_kept_in_order_of_step(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        for step in (2, 9, 10, 100):
            publish(folder, step)
        assert [p.name for p in folder.checkpoints()] == ["step-10", "step-100"]
        path, manifest = folder.newest("one")
        assert path.name == "step-100" and manifest["step"] == 100 and manifest["seconds"] == 1.0


def test_newest_is_of_its_stage(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        publish(folder, 3, stage="one")
        assert folder.newest("two") is None
        publish(folder, 6, stage="two")
        assert folder.newest("one")[0].name == "step-3"


def test_same_step_twice_keeps_the_first(tmp_path):
    """Saved at its step and again at the end of its epoch; at no moment is there no checkpoint."""
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        first = publish(folder, 3, keep=1)
        inode = first.stat().st_ino
        assert publish(folder, 3, keep=1) == first and first.stat().st_ino == inode
        assert not list(folder.staging.iterdir())


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"W" + raw[1:], lambda raw: raw + b"s"])
def test_damaged_checkpoint_is_named(tmp_path, damage):
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        file = publish(folder, 3) / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(UserError, match=str(file)):
            folder.newest("one")


def test_unpublished_checkpoint_does_not_count(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        (folder.staging / "checkpoint-7").mkdir(parents=True)
        (folder.staging / "checkpoint-7" / "model.safetensors").write_bytes(b"half")
        assert folder.newest("one") is None
        assert not folder.staging.exists()


def test_rewind(tmp_path):
    """Rows after the step go, a torn last line too; the step's evaluation goes where it will be written again."""
    rows = [{"kind": kind, "step": step} for step in (1, 2, 3) for kind in ("train", "eval")]
    for evaluated, kept in ((True, rows[:4]), (False, rows[:3])):
        with RunFolder(tmp_path / str(evaluated), recipe(), resume=False) as folder:
            folder.rewind(2)
            assert not folder.metrics.exists()
            for row in rows:
                folder.log(row)
            with folder.metrics.open("a") as file:
                file.write('{"kind": "train", "st')
            folder.rewind(2, evaluated)
            assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == kept


def test_space_is_checked(tmp_path):
    with RunFolder(tmp_path, recipe(), resume=False) as folder:
        folder.check_space(1)
        with pytest.raises(UserError, match="GB free"):
            folder.check_space(2**60)


def test_failure_on_a_full_disk_is_the_users_to_fix(tmp_path):
    """The cause is read wherever it stands in what a library raises; another error stays itself."""
    with pytest.raises(RuntimeError, match="unexpected pos"), RunFolder(tmp_path / "a", recipe(), resume=False):
        raise RuntimeError("unexpected pos 1 vs 0")
    for number, said in ((errno.ENOSPC, "No space left on device"), (errno.EIO, "Input/output error")):
        with pytest.raises(UserError, match=f"{said}; .*--resume"), RunFolder(tmp_path / "b", recipe(), resume=True):
            try:
                raise OSError(number, os.strerror(number))
            finally:
                raise RuntimeError("unexpected pos 1 vs 0")
    with pytest.raises(UserError, match="No space left"), RunFolder(tmp_path / "b", recipe(), resume=True):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    with RunFolder(tmp_path / "b", recipe(), resume=True):
        pass


@pytest.mark.parametrize("error", [UserError("x"), RuntimeError("out of memory"), KeyError("h"), KeyboardInterrupt()])
@pytest.mark.parametrize("made", [True, False])
def test_an_error_before_anything_was_written_leaves_the_folder_free(tmp_path, error, made):
    root = tmp_path / "run" if made else tmp_path
    with pytest.raises(type(error)), RunFolder(root, recipe(), resume=False) as folder:
        folder.staging.mkdir(parents=True)
        raise error
    assert not list(tmp_path.iterdir())
    with RunFolder(root, recipe(seed=1), resume=False):
        pass


def test_an_error_after_something_was_written_keeps_it(tmp_path):
    with pytest.raises(KeyError), RunFolder(tmp_path, recipe(), resume=False) as folder:
        folder.log({"step": 1})
        raise KeyError
    assert (tmp_path / "recipe.yaml").is_file() and (tmp_path / "metrics.jsonl").is_file()


def test_half_deleted_checkpoint_is_out_of_sight(tmp_path, monkeypatch):
    """A kill while an older checkpoint is deleted leaves files, but none that a resume would look at."""
    with RunFolder(tmp_path / "run", recipe(), resume=False) as folder:
        publish(folder, 3, keep=1)
        with monkeypatch.context() as patched:
            patched.setattr("compressft.run.folder.shutil.rmtree", lambda *args, **kwargs: None)
            publish(folder, 6, keep=1)
        left = [path.name for path in (folder.root / "checkpoints").iterdir()]
        assert len(left) > 1 and "step-3" not in left
        assert folder.checkpoints() == [folder.root / "checkpoints" / "step-6"]
        assert folder.newest("another") is None
        found = folder.newest("one")
        assert found is not None and found[1]["step"] == 6
        assert [path.name for path in (folder.root / "checkpoints").iterdir()] == ["step-6"]
