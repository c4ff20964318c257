"""YAML of strangers: one meaning for every text, bounds before anything is built, and what is written reads back."""

import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compressft.errors import UserError
from compressft.recipe.recipe import load_recipe, parse_recipe
from compressft.utils.strict_yaml import DEEPEST, DIGITS, LONGEST, read_yaml, write_yaml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300)
@given(VALUES)
def test_what_is_written_reads_back(value):
    assert read_yaml(write_yaml(value), "here") == value


@settings(max_examples=300)
@given(st.text(alphabet="-+.:_0123456789eExXoOnfNyYsSlLtTrRuU~=<", max_size=8))
def test_a_plain_scalar_that_is_no_text_is_what_everybody_reads(text):
    """A number or truth is the same to YAML 1.1, or it is refused, or 1.2's own form of a number."""
    try:
        ours = read_yaml(f"x: {text}", "here")["x"]
    except (UserError, TypeError, KeyError):
        return
    if isinstance(ours, str) or ours is None:
        return
    try:
        theirs = yaml.safe_load(f"x: {text}")["x"]
    except ValueError:
        return
    assert theirs in (ours, text)


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_is_a_value_or_one_line(text):
    try:
        read_yaml(text, "here")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("here: ")


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "y", "1:30", "190:20:30", "2026-01-01", "1_000", "0b11"])
def test_words_of_yaml_1_1_are_text(word):
    assert read_yaml(word, "here") == word


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a: 1, a: 2}", "line 1, column 8: key 'a' is given twice"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("010", "is 8 to some and 10 to others"),
        ("1: 2", "a key must be text"),
        ("? [a]\n: 1", "a key must be text"),
        ("!!int 0b11", "tags are not read"),
        ("!!python/object/apply:os.system [true]", "tags are not read"),
        ("a: &a [*a]", "*a stands inside what it stands for"),
        ("9" * (DIGITS + 1), "is too long"),
        ("[" * DEEPEST * 60, f"nested deeper than {DEEPEST}"),
        ("x" * (LONGEST + 1), "characters; at most"),
        ("a: [", "is not YAML"),
        ("--- 1\n--- 2", "is not YAML"),
    ],
)
def test_refused(text, said):
    with pytest.raises(UserError) as caught:
        read_yaml(text, "here")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_aliases_do_not_grow_without_bound():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    before = time.process_time()
    with pytest.raises(UserError, match="values once aliases are written out"):
        read_yaml("\n".join(lines), "here")
    assert time.process_time() - before < 1


def test_an_alias_is_a_value_of_its_own():
    value = read_yaml("a: &one [1]\nb: *one", "here")
    value["a"].append(2)
    assert value == {"a": [1, 2], "b": [1]}


BASE = "extends: banking77-full\nname: t\nstages:\n"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{name: task, train: {batch_size: yes}}", "batch_size: Input should be a valid integer (got 'yes')"),
        ("{name: task, train: {batch_size: 1:30}}", "batch_size: Input should be a valid integer (got '1:30')"),
        ("{name: task, train: {batch_size: true}}", "batch_size: Input should be a valid integer (got True)"),
        ('{name: task, train: {batch_size: "8"}}', "batch_size: Input should be a valid integer (got '8')"),
        ("{name: task, train: {epochs: on}}", "epochs: Input should be a valid number (got 'on')"),
        ("{name: task, train: {gradient_checkpointing: 1}}", "Input should be a valid boolean (got 1)"),
        ("{name: task, passes: [{type: {a: 1}}]}", "pass {'a': 1} is not known"),
        ("{name: [a]}", "a stage's name must be text"),
        ("{name: task}\n  - {name: task}", "'task' is given twice"),
    ],
)
def test_a_recipe_takes_nothing_for_what_it_is_not(tmp_path, stage, said):
    path = tmp_path / "r.yaml"
    path.write_text(f"{BASE}  - {stage}\n")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


NO_NAMES = ["../../x", "", "/x", "a/b", ".", "..", ".hidden", "x\x00", "x\x1b[0m", "x" * 300, " "]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_is_a_name(name):
    document = load_recipe("banking77-full").model_dump() | {"name": name}
    with pytest.raises(UserError, match="name: "):
        parse_recipe(document)


def test_set_reads_the_same_way():
    with pytest.raises(UserError, match="is given twice"):
        load_recipe("banking77-full", ["data.columns={text: a, text: b}"])
    with pytest.raises(UserError, match="valid integer"):
        load_recipe("banking77-full", ["stages.task.train.batch_size=yes"])
