"""Selections and repeats: which rows are chosen, that they are trained on, and how programs are unrolled."""

from __future__ import annotations

import json

import numpy as np
import pytest

from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.recipe.steps import Select, unrolled
from compressft.run.select import choose, probabilities
from tests.run.killed import killed_and_resumed, trained
from tests.run.test_program import saved
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

# Cases share trainings.
pytestmark = pytest.mark.dear


def select(**fields):
    return Select.model_validate({"name": "pool", "by": "one", "from": "texts", **fields})


BELIEFS = np.array([[0.95, 0.05], [0.6, 0.4], [0.08, 0.92], [0.5, 0.5], [0.99, 0.01]])


def test_confident_rows_come_first_and_others_not_at_all():
    order, labels = choose(select(above=0.9), [BELIEFS])
    assert order == [4, 0, 2] and labels[[4, 0, 2]].tolist() == [0, 0, 1]
    assert choose(select(above=0.9, rows=2), [BELIEFS])[0] == [4, 0]
    assert choose(select(above=1.0), [BELIEFS])[0] == []


def test_agreement_is_of_all_and_as_sure_as_the_least_sure():
    other = np.array([[0.91, 0.09], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.2, 0.8]])
    order, _ = choose(select(type="agreed", by=["one", "two"], above=0.5), [BELIEFS, other])
    # Row 0 by 0.91, row 2 by 0.7, row 3 by 0.5; the two others are called differently.
    assert order == [0, 2, 3]


def test_uncertain_rows_are_those_of_highest_entropy():
    assert choose(select(type="uncertain", rows=2), [BELIEFS])[0] == [3, 1]
    even = np.full((4, 3), 1 / 3)
    assert choose(select(type="uncertain", rows=3), [even])[0] == [0, 1, 2], "ties stay in the pool's order"


def test_probabilities_are_a_softmax_that_does_not_overflow():
    found = probabilities(np.array([[1e4, 0.0], [0.0, np.log(3.0)]], dtype=np.float32))
    np.testing.assert_allclose(found, [[1.0, 0.0], [0.25, 0.75]], atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"type": "agreed"}, "agreement is of several stages"),
        ({"by": ["one", "two"]}, "one stage chooses what is confident"),
        ({"type": "uncertain"}, "rows: is required"),
    ],
)
def test_selections_that_cannot_be(fields, said):
    with pytest.raises(ValueError, match=said):
        select(**fields)


def names(steps):
    return [(stage["name"], [one["name"] for one in stage.get("select", ())]) for stage in unrolled(steps)]


def test_repeats_are_copies_that_name_the_last_ones():
    steps = [
        {"name": "first", "data": "few"},
        {"name": "pool", "select": {"type": "uncertain", "rows": 4, "by": "first", "from": "rest"}},
        {"name": "next", "data": ["few", "pool"], "start": "first"},
        {"repeat": 2, "stages": ["pool", "next"]},
    ]
    flat = unrolled(steps)
    assert names(steps) == [("first", []), ("next", ["pool"]), ("next-2", ["pool-2"]), ("next-3", ["pool-3"])]
    assert [stage["data"] for stage in flat[1:]] == [
        ["few", "pool"],
        ["few", "pool", "pool-2"],
        ["few", "pool", "pool-2", "pool-3"],
    ]
    assert {stage["start"] for stage in flat[1:]} == {"first"}
    assert steps[2]["data"] == ["few", "pool"], "what was given is left alone"


def test_a_copy_goes_on_from_the_copy_before_it():
    steps = [
        {"name": "a"},
        {"repeat": 3, "stages": [{"name": "b", "objectives": [{"type": "distill", "teacher": "a"}], "start": "b"}]},
    ]
    steps[1]["stages"][0].pop("start")
    assert [one["name"] for one in unrolled(steps)] == ["a", "b", "b-2", "b-3"]
    both = [{"name": "a"}, {"name": "b", "start": "a"}, {"repeat": 2, "stages": ["a", "b"]}]
    assert [(one["name"], one.get("start")) for one in unrolled(both)] == [
        ("a", None), ("b", "a"), ("a-2", None), ("b-2", "a-2"), ("a-3", None), ("b-3", "a-3"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"name": "a"}, {"repeat": 0, "stages": ["a"]}], "from 1 to 100; got 0"),
        ([{"name": "a"}, {"repeat": True, "stages": ["a"]}], "whole number"),
        ([{"name": "a"}, {"repeat": 2, "stages": ["b"]}], "'b' is no earlier step"),
        ([{"name": "a"}, {"repeat": 2}], "wants `stages`"),
        ([{"name": "a"}, {"name": "p", "select": {}}], "no stage after it trains on"),
    ],
)
def test_programs_that_cannot_be_unrolled(steps, said):
    with pytest.raises(ValueError, match=said):
        unrolled(steps)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A few labelled rows, a pool with labels and one without."""
    folder = tmp_path_factory.mktemp("select")
    save_tiny(folder / "base")
    rows = rows_of(60)
    write_jsonl(folder / "few.jsonl", rows[:16])
    write_jsonl(folder / "rest.jsonl", rows[16:])
    write_jsonl(folder / "texts.jsonl", [{"text": row["text"]} for row in rows[16:]])
    return folder


def recipe_of(base, *steps, sources=("few", "rest")):
    train = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32", "save": 2}
    steps = [step if {"select", "repeat"} & set(step) else {"train": train, **step} for step in steps]
    data = {name: {"train": str(base / f"{name}.jsonl"), "max_length": 16} for name in sources}
    return parse_recipe(
        {"name": "select", "model": str(base / "base"), "data": data, "stages": steps, "export": {"enabled": False}}
    )


FIRST = {"name": "first", "data": "few"}
ACTIVE = (
    FIRST,
    {"name": "pool", "select": {"type": "uncertain", "rows": 4, "by": "first", "from": "rest"}},
    {"name": "next", "data": ["few", "pool"], "start": "first"},
    {"repeat": 2, "stages": ["pool", "next"]},
)


def chosen(folder, name):
    return json.loads((folder / "memo" / f"select-{name}.json").read_text())


@pytest.fixture(scope="module")
def active(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("active") / "run"
    return folder, trained(recipe_of(base, *ACTIVE), folder).stages


def test_rounds_choose_other_rows_and_train_on_all_of_them(active):
    folder, stages = active
    rows = [[row["__row__"] for row in chosen(folder, name)] for name in ("pool", "pool-2", "pool-3")]
    assert [len(one) for one in rows] == [4, 4, 4]
    assert len({row for one in rows for row in one}) == 12, "no row is chosen twice"
    # 14 of the 16 rows train; two epochs.
    assert [stage["examples"] for stage in stages] == [28, 36, 44, 52]


def test_pseudo_labels_are_the_models_own(base, tmp_path):
    pseudo = {"name": "pseudo", "select": {"by": "first", "from": "texts", "above": 0.0, "rows": 10}}
    recipe = recipe_of(base, FIRST, pseudo, {"name": "second", "data": ["few", "pseudo"]}, sources=("few", "texts"))
    stages = trained(recipe, tmp_path / "run").stages
    rows = chosen(tmp_path / "run", "pseudo")
    assert len(rows) == 10 and {row["label"] for row in rows} <= {"even", "odd"}
    assert stages[1]["examples"] == 2 * (14 + 10)


@pytest.mark.parametrize("at", [3, 9, 15])
def test_killed_amid_a_program_and_resumed(base, active, tmp_path, at):
    recipe = recipe_of(base, *ACTIVE)
    killed_and_resumed(recipe, tmp_path / "run", at)
    for stage in ("first", "next", "next-2", "next-3"):
        theirs, ours = saved(active[0], stage), saved(tmp_path / "run", stage)
        assert all((theirs[name] == ours[name]).all() for name in theirs), stage


def test_a_stage_starts_where_it_says(base, tmp_path):
    """A probe leaves the backbone as it finds it."""
    probe = {"method": {"type": "probe"}, "data": "few"}
    recipe = recipe_of(
        base, FIRST, {"name": "second", "data": "few"}, {"name": "back", "start": "first", **probe},
        {"name": "anew", "start": "base", **probe}, sources=("few",),
    )  # fmt: skip
    trained(recipe, tmp_path / "run")
    from safetensors.torch import load_file

    name = "bert.encoder.layer.0.output.dense.weight"
    first, second, back, anew = (saved(tmp_path / "run", stage)[name] for stage in ("first", "second", "back", "anew"))
    assert (back == first).all() and not (second == first).all()
    pretrained = load_file(base / "base" / "model.safetensors")
    assert (anew == pretrained[name.removeprefix("bert.")]).all()


def asks(**fields):
    return {"name": "p", "select": {"by": "first", "from": "rest", **fields}}


JOINED = {"name": "n", "data": ["few", "p"]}


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((asks(by="frist"), JOINED), "'frist' is no stage before it.*did you mean 'first'"),
        ((asks(**{"from": "rset"}), JOINED), "'rset' is no source"),
        ((JOINED,), r"stages\.1\.data: 'p' is no selection made before; made: none"),
        (({**asks(), "name": "first"}, {"name": "n", "data": "few"}), "the name is taken"),
        (({"name": "n", "data": "rest", "start": "frist"},), r"stages\.1\.start: 'frist' is neither base nor"),
    ],
)
def test_programs_that_cannot_be_are_one_line(base, steps, said):
    with pytest.raises(UserError, match=said) as caught:
        recipe_of(base, FIRST, *steps)
    assert "\n" not in str(caught.value)
