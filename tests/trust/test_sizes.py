"""Whole numbers beyond all use: refused with the field's name, wherever a recipe has one."""

import math
from typing import get_args

import pytest

from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from compressft.utils.strict import LARGEST
from tests.settings import METHODS, OBJECTIVES, PASSES
from tests.tiny_folder import document

KINDS = {"method": METHODS, "passes": PASSES, "objectives": OBJECTIVES}


def stage(where, name, **fields):
    one = {"type": name, **KINDS[where][name], **fields}
    return {"name": "only", where: one if where == "method" else [one]}


def takes_whole_numbers(annotation):
    return annotation is int or any(takes_whole_numbers(part) for part in get_args(annotation))


def fields_of(where, name):
    from compressft import methods, objectives, passes

    registry = {"method": methods.METHODS, "passes": passes.PASSES, "objectives": objectives.OBJECTIVES}[where]
    return [field for field, info in registry[name].model_fields.items() if takes_whole_numbers(info.annotation)]


ENTRIES = [(where, name, field) for where in KINDS for name in KINDS[where] for field in fields_of(where, name)]


@pytest.mark.parametrize("value", [10**20, -(10**400), LARGEST + 1])
@pytest.mark.parametrize(
    ("section", "field"),
    [("data", "max_length"), ("data", "per_class"), ("data", "limit"), ("data", "seed"), ("train", "batch_size"),
     ("train", "max_steps"), ("train", "gradient_accumulation"), ("train", "keep_checkpoints"), ("train", "save"),
     ("export", "threads"), ("export", "latency_rounds"), ("export", "latency_shapes")],
)  # fmt: skip
def test_sections(section, field, value):
    recipe = document("minilm", "rows.jsonl")
    given = [[1, value]] if field == "latency_shapes" else value
    if section == "train":
        recipe["stages"][0]["train"] = {field: given}
    else:
        recipe.setdefault(section, {})[field] = given
    with pytest.raises(UserError, match=rf"{field}.*wants (a whole number of at most 4,294,967,295|'epoch')") as caught:
        parse_recipe(recipe, "tiny")
    assert "\n" not in str(caught.value)


def test_every_transform():
    assert len(ENTRIES) > 20
    for where, name, field in ENTRIES:
        recipe = document("minilm", "rows.jsonl", stages=[stage(where, name, **{field: 10**30})])
        with pytest.raises(UserError, match=field) as caught:
            parse_recipe(recipe, "tiny")
        assert "\n" not in str(caught.value), (name, field)


@pytest.mark.parametrize("epochs", [1e300, 1e7, math.inf])
def test_epochs(epochs):
    recipe = document("minilm", "rows.jsonl", stages=[{"name": "only", "train": {"epochs": epochs}}])
    with pytest.raises(UserError, match="epochs"):
        parse_recipe(recipe, "tiny")
