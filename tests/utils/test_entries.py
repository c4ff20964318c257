"""A run directory's own entries: links out of it are refused before anything is touched, a killed run's rest goes."""

import os
from pathlib import Path

import pytest

from compressft.errors import UserError
from compressft.utils.entries import WRITTEN, refuse_links, sweep


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def outside(tmp_path) -> Path:
    """Somebody else's folder."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "run"
    (folder / "stages" / "one").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: r")
    return folder


@pytest.mark.parametrize(
    "name", [*WRITTEN, "stages/two", "checkpoints/step-3/model.safetensors", "mine", "report/a.png"]
)
@pytest.mark.parametrize("to", ["folder", "file", "nothing", "itself"])
def test_a_link_out_is_refused_by_name(root, outside, name, to):
    link = root / name
    if link.is_dir() or link.is_file():
        link.rename(root / "aside")
    link.parent.mkdir(parents=True, exist_ok=True)
    targets = {"folder": outside, "file": outside / "thesis.tex", "nothing": outside / "gone", "itself": link}
    link.symlink_to(targets[to])
    before = contents(outside), sorted(os.listdir(root))
    if to == "itself" and name not in WRITTEN:
        refuse_links(root)
    else:
        with pytest.raises(UserError, match=rf"^{link}: is a symbolic link to ") as caught:
            refuse_links(root)
        assert "\n" not in str(caught.value)
    assert (contents(outside), sorted(os.listdir(root))) == before


def test_a_link_inside_harms_nobody_unless_a_run_writes_there(root):
    (root / "latest").symlink_to("stages/one")
    (root / "stages" / "two").symlink_to(root / "stages" / "one")
    refuse_links(root)
    (root / "model").symlink_to("stages/one")
    with pytest.raises(UserError, match=f"^{root / 'model'}: is a symbolic link"):
        refuse_links(root)


def test_the_directory_itself_may_be_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    (root / "latest").symlink_to("stages/one")
    refuse_links(tmp_path / "link")


# What a kill may leave, and what looks like it.
LEFT = (
    *(".model.tmp/x", ".delta.tmp/x", ".onnx.tmp/x", ".recipe.tmp", ".metrics.tmp", ".identity.tmp"),
    *("stages/.one.tmp/x", "stages/.one.old/x", "memo/.one.key.json.tmp", "report/.report.json.77.tmp"),
    *("checkpoints/.writing/checkpoint-3/x", "checkpoints/.dropped-step-3/x", ".measuring-ab12cd34/base.onnx"),
    *("tmpab_2cd34/base.onnx", "tmp12345678/dense/x", "tmpabcdefgh/.dense.tmp/x"),
)
OTHERS = (
    *("tmp", "tmpx", "tmp12345678.txt", "tmpnotes12/thesis.tex", ".mine.tmp", ".model.tmp.txt", "model/.x.tmp", ".old"),
    *("stages/one/x", "memo/one.json", "report/report.json", "checkpoints/step-3/x", "tmpZbcdefgh/base.onnx"),
)


def test_what_a_kill_left_goes_and_nothing_else(root):
    for name in (*LEFT, *OTHERS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    sweep(root)
    files = {name for name, content in contents(root).items() if content}
    assert files == {*OTHERS, "recipe.yaml"}
    left = {name.split("/")[0] for name in LEFT} - {name.split("/")[0] for name in OTHERS}
    assert not left & set(os.listdir(root))
    sweep(root)
    assert {name for name, content in contents(root).items() if content} == files


def test_a_folder_that_nothing_replaced_comes_back(root):
    """Killed between two renames: the older folder is aside, the newer one not there yet."""
    for name in (".onnx.old/model.onnx", ".onnx.tmp/model.onnx", "model/x", ".model.old/x"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(name)
    sweep(root)
    assert (root / "onnx" / "model.onnx").read_text() == ".onnx.old/model.onnx"
    assert (root / "model" / "x").read_text() == "model/x"
    assert sorted(os.listdir(root)) == ["model", "onnx", "recipe.yaml", "stages"]


def test_a_link_among_what_was_left_is_not_followed(root, outside):
    (root / ".model.tmp").symlink_to(outside)
    before = contents(outside)
    sweep(root)
    assert contents(outside) == before and not (root / ".model.tmp").is_symlink()
