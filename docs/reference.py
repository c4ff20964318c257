"""The reference page of recipes, from the schema that editors use."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from compressft.recipe.recipe import Recipe
from compressft.recipe.schema import members, recipe_schema

TITLES = {"task": "Tasks", "method": "Methods", "objective": "Objectives", "pass": "Passes", "analysis": "Analyses"}
SECTIONS = {
    "Stage": "A stage",
    "FeedConfig": "A feed",
    "Select": "A selection of rows",
    "SelectStep": "A selection as a step",
    "RepeatStep": "A repeat",
    "DataConfig": "A source of rows",
    "AugmentConfig": "Rewritten rows",
    "TrainConfig": "Training",
    "ExportConfig": "Export",
}


def write_reference(path: Path) -> None:
    """Write the page; it is left alone where nothing has changed."""
    text = reference()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def reference() -> str:
    """Every field of a recipe, and of all that it can name."""
    schema = recipe_schema()
    parts = [
        "# Recipe reference\n\nThis page is made from the code (`compressft schema` prints the same as a JSON schema)."
    ]
    parts.append(_section("A recipe", inspect.getdoc(Recipe) or "", schema["properties"], 2))
    for name, title in SECTIONS.items():
        model = schema["$defs"][name]
        parts.append(_section(title, model.get("description", ""), model["properties"], 2))
    for kind, registry in members().items():
        parts.append(f"## {TITLES[kind]}")
        for name in sorted(registry):
            model = schema["$defs"][f"{kind}.{name}"]
            fields = {key: value for key, value in model["properties"].items() if key != "type"}
            parts.append(_section(f"{kind} `{name}`", model.get("description", ""), fields, 3))
    return "\n\n".join(parts) + "\n"


def _section(title: str, words: str, fields: dict[str, Any], level: int) -> str:
    rows = [f"| `{name}` | {_type(field)} | {_default(field)} |" for name, field in fields.items()]
    table = (
        "\n".join(["| field | value | default |", "| --- | --- | --- |", *rows]) if rows else "No fields of its own."
    )
    return f"{'#' * level} {title}\n\n{_prose(words)}\n\n{table}"


def _prose(words: str) -> str:
    """A docstring as Markdown: no indented block, no heading, no HTML."""
    lines = [line.strip() for line in words.splitlines()]
    return "\n".join(lines).replace("<", "&lt;").replace("*", "\\*").strip() or "."


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "$ref" in field:
        return _link(field["$ref"].removeprefix("#/$defs/"))
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one != {"type": "null"}))
    if "oneOf" in field:
        return "with fields"
    kind = field.get("type", "anything")
    if kind == "array":
        item = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(item)}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"{_type(field['additionalProperties'])} by name"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return words.get(kind, str(kind)) + _limits(field)


def _limits(field: dict[str, Any]) -> str:
    signs = {"minimum": "&ge;", "exclusiveMinimum": "&gt;", "maximum": "&le;", "exclusiveMaximum": "&lt;"}
    found = [f"{sign} {field[name]:g}" for name, sign in signs.items() if isinstance(field.get(name), int | float)]
    return f" ({', '.join(found)})" if found else ""


def _link(name: str) -> str:
    title = SECTIONS.get(name)
    return f"[{title.lower()}](#{title.lower().replace(' ', '-')})" if title else f"`{name}`"


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return ""
    value = field["default"]
    if value in (None, "", []):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
