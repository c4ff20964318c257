"""The JSON schema of recipes: what editors complete and check, and what the reference pages are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from compressft.evaluation.analyses import ANALYSES
from compressft.methods import METHODS
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.recipe import Recipe
from compressft.recipe.steps import MOST
from compressft.tasks import TASKS

# As pydantic gives it.
Schema: TypeAlias = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = "#/$defs/{model}"
# What a recipe file may say besides a recipe's fields.
EXTENDS = {
    "type": "string",
    "description": "A shipped recipe's name, or a file next to this one, whose fields this recipe starts from.",
}


def members() -> dict[str, dict[str, type[BaseModel]]]:
    """The five registries: kind -> name -> the model of its fields."""
    return {
        "task": {name: task.settings_class for name, task in TASKS.items()},
        "method": dict(METHODS),
        "objective": dict(OBJECTIVES),
        "pass": dict(PASSES),
        "analysis": dict(ANALYSES),
    }


def recipe_schema() -> Schema:
    """The schema of a recipe file (JSON Schema 2020-12).

    A task, method, objective, pass or analysis is a name, or an object whose `type` says which fields it may have.
    """
    whole = Recipe.model_json_schema(ref_template=REFERENCE)
    definitions: Schema = whole.pop("$defs")
    forms = {kind: _forms(kind, registry, definitions) for kind, registry in members().items()}
    stage = definitions["Stage"]["properties"]
    _put(whole["properties"], "task", forms["task"])
    for properties in (stage, definitions["FeedConfig"]["properties"]):
        _put(properties, "task", {"anyOf": [forms["task"], {"type": "null"}]})
    _put(stage, "method", forms["method"])
    for name, kind in (("objectives", "objective"), ("passes", "pass")):
        _put(stage, name, {"type": "array", "items": forms[kind]})
    _put_steps(whole["properties"], definitions)
    _put(whole["properties"], "analyses", {"type": "array", "items": forms["analysis"]})
    whole["properties"]["extends"] = EXTENDS
    # What a recipe extends may hold what it requires.
    whole.pop("required", None)
    for name in ("TaskSettings", "Transform", "Analysis"):
        definitions.pop(name, None)
    return {"$schema": DIALECT, **whole, "$defs": dict(sorted(definitions.items()))}


def _put_steps(properties: Schema, definitions: Schema) -> None:
    """Between its stages a recipe may have selections and repeats, which are unrolled when it is read."""
    select = definitions["Select"]
    fields = select["properties"]
    fields["from"] = fields.pop("pool") | {"title": "From"}
    fields["by"] = {"anyOf": [{"type": "string"}, fields["by"]]}
    select["required"] = ["by", "from", "name"]
    # As a step, its name is the step's.
    unnamed = {**select, "required": ["by", "from"], "title": "Selection"}
    unnamed["properties"] = {name: form for name, form in fields.items() if name != "name"}
    definitions["SelectStep"] = {
        "description": "Choose rows before the next stage trains; its `data` may name them.",
        "type": "object",
        "properties": {"name": fields["name"], "select": unnamed},
        "required": ["name", "select"],
        "additionalProperties": False,
    }
    steps = [{"$ref": f"#/$defs/{name}"} for name in ("Stage", "SelectStep", "RepeatStep")]
    inside = {"anyOf": [{"type": "string"}, *steps[:2]]}
    definitions["RepeatStep"] = {
        "description": "Copies of earlier steps, or of steps that are written here.",
        "type": "object",
        "properties": {
            "repeat": {"type": "integer", "minimum": 1, "maximum": MOST},
            "stages": {"type": "array", "items": inside, "minItems": 1},
        },
        "required": ["repeat", "stages"],
        "additionalProperties": False,
    }
    properties["stages"]["items"] = {"anyOf": steps}


def _put(properties: Schema, name: str, form: Mapping[str, object]) -> None:
    """Take another form for a field, which keeps what is said of it."""
    kept = {key: value for key, value in properties[name].items() if key in ("default", "description", "title")}
    properties[name] = {**form, **kept}


def _forms(kind: str, registry: Mapping[str, type[BaseModel]], definitions: Schema) -> Schema:
    """What may stand where a member of a registry is named; its models are added to the definitions."""
    mapping = {}
    for name, model in registry.items():
        schema = model.model_json_schema(ref_template=REFERENCE)
        definitions.update(schema.pop("$defs", {}))
        # Two registries may have members of one name.
        key = f"{kind}.{name}"
        schema["properties"]["type"] = {"const": name, "description": f"Which {kind} it is."}
        schema["required"] = sorted({"type", *schema.get("required", ())})
        definitions[key] = schema
        mapping[name] = f"#/$defs/{key}"
    named = {"enum": sorted(registry), "description": f"A {kind} by its name, with its defaults."}
    detailed = {
        "oneOf": [{"$ref": reference} for reference in mapping.values()],
        "discriminator": {"propertyName": "type", "mapping": mapping},
        "type": "object",
    }
    return {"anyOf": [named, detailed]}
