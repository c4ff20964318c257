"""Trackers: refused where one is not installed, told of every stage where it is; nothing where none is asked."""

from __future__ import annotations

import io
from importlib.util import find_spec

import pytest
from rich.console import Console

from compressft.errors import UserError
from compressft.recipe.recipe import Recipe, parse_recipe
from compressft.run import extras
from compressft.run.flow import run
from compressft.run.track import flat
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

STAGES = [
    {"name": "dense", "train": {"max_steps": 2, "batch_size": 8}},
    {"name": "small", "passes": ["int8"], "train": {"max_steps": 3, "batch_size": 8}},
]


def recipe(folder, **changes) -> Recipe:
    data = write_jsonl(folder / "rows.jsonl", rows_of(24))
    whole = document(folder / "bert", data, stages=STAGES, export={"enabled": False})
    return parse_recipe({**whole, **changes})


def test_one_tracker_is_a_list_of_one_and_none_leaves_the_recipe_as_it_was(tmp_path):
    one = recipe(tmp_path, report_to="wandb")
    assert one.report_to == ("wandb",) and one.hash != recipe(tmp_path).hash
    assert recipe(tmp_path, report_to=[]).hash == recipe(tmp_path).hash
    assert "report_to" not in recipe(tmp_path).to_yaml()
    with pytest.raises(UserError, match=r"report_to\.0: .*'wandb', 'tensorboard', 'mlflow' or 'trackio'.*did you mean"):
        recipe(tmp_path, report_to="tensorbord")


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow", "trackio"])
def test_a_tracker_that_is_missing_is_one_line_before_anything_is_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"^report_to: {name} is not installed; pip install {name}$"):
        run(recipe(tmp_path, report_to=name, model="no-such-owner/no-such-model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_eight_bit_optimisers_want_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    stages = [{"name": "one", "train": {"optimizer": "adamw_8bit"}}]
    with pytest.raises(UserError, match=r"^stages.one.train.optimizer: adamw_8bit .*pip install bitsandbytes$"):
        run(recipe(tmp_path, stages=stages), tmp_path / "out")


def test_what_trackers_are_told_are_scalars_by_name():
    status = {"int8": {"bits": {"now": 32, "target": 8}}, "ziplm": {"sparsity": {"now": 0.1, "target": 0.5}}}
    assert flat({"task": 0.5}, status) == {
        "terms/task": 0.5,
        "int8/bits/now": 32.0,
        "int8/bits/target": 8.0,
        "ziplm/sparsity/now": 0.1,
        "ziplm/sparsity/target": 0.5,
    }


@pytest.mark.dear
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_has_every_stage_in_the_run_directory(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    save_tiny(tmp_path / "bert")
    said = io.StringIO()
    run(recipe(tmp_path, report_to="tensorboard"), tmp_path / "out", console=Console(file=said))
    assert {path.name for path in (tmp_path / "out" / "tracking").iterdir()} == {"dense", "small"}
    for stage, steps in (("dense", 2), ("small", 3)):
        events = EventAccumulator(str(tmp_path / "out" / "tracking" / stage)).Reload()
        names = set(events.Tags()["scalars"])
        assert {"train/loss", "train/terms/task", "eval/loss", "eval/accuracy"} <= names, names
        assert ("train/int8/bits/now" in names) == (stage == "small")
        assert [event.step for event in events.Scalars("train/loss")] == [*range(1, steps + 1)]
    # Ours is said once, and the Trainer's own printing stays off.
    assert said.getvalue().count("small: step 3/3, validation") == 1 and "{'loss'" not in said.getvalue()


def test_the_packages_have_the_names_that_recipes_say():
    """`find_spec` is asked by these names; where one is installed here, transformers sees it too."""
    from transformers.integrations import integration_utils

    for name in Recipe.model_fields["report_to"].annotation.__args__[0].__args__:
        assert getattr(integration_utils, f"is_{name}_available")() == (find_spec(name) is not None)
