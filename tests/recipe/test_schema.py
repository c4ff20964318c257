"""The JSON schema of recipes: it takes what the parser takes, and refuses what an editor should underline."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest
import yaml

from compressft.recipe.document import shipped_recipes
from compressft.recipe.recipe import load_recipe, parse_recipe
from compressft.recipe.schema import members, recipe_schema


@pytest.fixture(scope="module")
def check():
    schema = json.loads(json.dumps(recipe_schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def check(document):
        return [error.message for error in validator.iter_errors(document)]

    return check


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_fit_as_written_and_as_resolved(check, name):
    assert check(yaml.safe_load(shipped_recipes()[name].read_text())) == []
    assert check(json.loads(load_recipe(name).model_dump_json())) == []


GOOD = {
    "name": "x",
    "model": "minilm",
    "data": {"texts": {"train": "a.txt"}, "mine": {"train": ["a.jsonl", "b.jsonl"]}},
    "stages": [
        {"name": "domain", "task": {"type": "masked-lm", "whole_words": True}, "data": "texts"},
        {"name": "target", "data": "mine", "method": {"type": "adapter", "reduction_factor": 8}, "passes": ["int8"]},
    ],
    "analyses": [{"type": "closeness", "models": ["domain", "target"]}],
}


PROGRAM = [
    {"name": "first", "data": "mine"},
    {"name": "pool", "select": {"type": "uncertain", "rows": 5, "by": "first", "from": "texts"}},
    {"name": "next", "data": ["mine", "pool"], "start": "base"},
    {"repeat": 2, "stages": ["pool", {"name": "more", "data": "mine"}]},
]


def test_programs_of_stages_fit(check):
    assert check(GOOD) == []
    assert check({**GOOD, "stages": PROGRAM}) == []
    assert check({**GOOD, "stages": [*PROGRAM[:2], {"repeat": 0, "stages": ["first"]}]})
    assert check({**GOOD, "stages": [{"name": "pool", "select": {"by": "first", "form": "texts"}}]})
    resolved = parse_recipe({**GOOD, "stages": PROGRAM, "analyses": []})
    assert check(json.loads(resolved.model_dump_json())) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["modle"], "minilm"),
        (["stages", 0, "task", "whole_word"], True),
        (["stages", 0, "task", "type"], "masked"),
        (["stages", 1, "method"], "adaptor"),
        (["stages", 1, "method", "reduction_facter"], 8),
        (["stages", 1, "passes", 0], {"type": "int8", "bits": 8}),
        (["stages", 1, "train"], {"batch_size": "many"}),
        (["data", "texts", "max_lenght"], 8),
        (["analyses", 0, "type"], "closness"),
    ],
)
def test_what_the_parser_refuses_is_underlined(check, path, value):
    document = copy.deepcopy(GOOD)
    node = document
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    assert check(document)


def test_every_member_of_every_registry_is_there_with_its_words():
    definitions = recipe_schema()["$defs"]
    for kind, registry in members().items():
        for name, model in registry.items():
            found = definitions[f"{kind}.{name}"]
            assert set(found["properties"]) == set(model.model_fields)
            assert found.get("description"), f"{kind} {name} has no docstring"


def test_no_reference_leads_nowhere():
    text = json.dumps(recipe_schema())
    definitions = recipe_schema()["$defs"]
    for part in text.split('"#/$defs/')[1:]:
        assert part.split('"')[0] in definitions
