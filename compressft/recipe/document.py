"""A recipe as plain data: read its file, merge what it extends, apply overrides."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from compressft.data.source import SOURCES, is_named
from compressft.errors import UserError, nearest
from compressft.utils.files import document_hash
from compressft.utils.strict_yaml import read_yaml
from compressft.utils.texts import JSON, read_text

# Fields of `data` that another source's rows do not inherit.
OF_THE_SOURCE = (*SOURCES, "subset", "validation", "test", "unlabelled", "per_class", "limit")


def shipped_recipes() -> dict[str, Path]:
    """Names and files of the recipes inside the package."""
    folder = Path(str(files("compressft"))) / "recipe" / "shipped"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def read_document(source: str | Path, seen: tuple[Path, ...] = ()) -> dict[str, JSON]:
    """A recipe's fields as plain data, by shipped name or YAML path, those it extends merged in.

    Raises:
        UserError: no such file, no YAML, or `extends` that leads back.
    """
    shipped = shipped_recipes()
    path = shipped[str(source)] if str(source) in shipped else Path(source)
    if not path.is_file():
        raise UserError(
            f"recipe: {str(source)!r} is neither a file nor a shipped recipe; shipped: "
            f"{', '.join(shipped)}{nearest(str(source), shipped)}"
        )
    if path.resolve() in seen:
        raise UserError(f"{path}: `extends` leads back to this file; remove it")
    document = read_yaml(read_text(path), str(path))
    if not isinstance(document, dict):
        raise UserError(f"{path}: wants a mapping of fields; got {type(document).__name__}")
    base_name = document.pop("extends", None)
    if base_name is None:
        return document
    beside = path.parent / str(base_name)
    base = read_document(beside if beside.is_file() else str(base_name), (*seen, path.resolve()))
    merged = _merge(base, document)
    assert isinstance(merged, dict)
    return merged


def recorded_hash(path: Path) -> str:
    """`document_hash` of a run's `recipe.yaml` as it was written, whatever later versions add to a recipe.

    Raises:
        UserError: it cannot be read.
    """
    return document_hash(read_yaml(read_text(path), str(path)))


def refuse_edited(path: Path, trained: str | None) -> None:
    """Compare a run's `recipe.yaml` with the hash that the run's folders have of the recipe that was trained.

    Args:
        trained: None where a folder of before does not say it.

    Raises:
        UserError: it is another recipe.
    """
    if trained is not None and recorded_hash(path) != trained:
        raise UserError(
            f"{path}: is not the recipe that was trained (its hash is another); restore it; "
            "other export settings are given with --set export.FIELD=VALUE"
        )


def _merge(base: JSON, new: JSON) -> JSON:
    """Mappings merge; stages merge by name; anything else is replaced, and so is a transform by one of another type."""
    if isinstance(base, dict) and isinstance(new, dict) and new.get("type") in (None, base.get("type")):
        merged = dict(base)
        for key, value in new.items():
            if key == "stages" and key in base:
                merged[key] = _merge_stages(base[key], value)
            elif key == "data" and isinstance(value, dict) and isinstance(data := base.get(key), dict):
                if is_named(value) != is_named(data):
                    merged[key] = value
                    continue
                merged[key] = _merge(_without_source(data, value), value)
            else:
                merged[key] = _merge(base[key], value) if key in base else value
        return merged
    return new


def _without_source(data: dict[str, JSON], new: dict[str, JSON]) -> dict[str, JSON]:
    """A new source of rows replaces the base's: its files, sample or hub id do not mix with it, nor what they left out.

    How many rows are taken was said of the other rows; a mapping of columns that does not fit is noticed.
    """
    if any(new.get(source) is not None for source in SOURCES):
        return {key: value for key, value in data.items() if key not in OF_THE_SOURCE}
    return data


def _merge_stages(base: JSON, new: JSON) -> JSON:
    before, after = _mappings(base), _mappings(new)
    if before is None or after is None:
        return new
    by_name: dict[str, dict[str, JSON]] = {}
    for stage in after:
        name = stage.get("name")
        if not isinstance(name, str):
            raise UserError(f"stages: a stage's name must be text; got {name!r}")
        if name in by_name:
            raise UserError(f"stages: {name!r} is given twice; make one of the two")
        by_name[name] = stage
    merged = [
        _merge(stage, by_name.pop(name, {}) if isinstance(name := stage.get("name"), str) else {}) for stage in before
    ]
    return merged + [stage for stage in after if stage["name"] in by_name]


def _mappings(value: JSON) -> list[dict[str, JSON]] | None:
    """A list of mappings; None where it is anything else."""
    if not isinstance(value, list):
        return None
    found = [item for item in value if isinstance(item, dict)]
    return found if len(found) == len(value) else None


def override_all(document: dict[str, JSON], overrides: Sequence[str]) -> None:
    """Apply `a.b=c` to a document, in place.

    Raises:
        UserError: no such path, or a value that is not YAML.
    """
    # A new source of rows drops the old one's splits; those that are set here come after it.
    for override in sorted(overrides, key=lambda o: o.partition("=")[0] not in {f"data.{s}" for s in SOURCES}):
        _apply(document, override)


def _apply(document: dict[str, JSON], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"--set {override!r}: wants PATH=VALUE, such as stages.student.train.epochs=2")
    value = read_yaml(text, f"--set {override!r}")
    node: dict[str, JSON] | list[JSON] = document
    steps = path.split(".")
    for i, step in enumerate(steps[:-1]):
        node = _child(node, step, override, ".".join(steps[: i + 1]))
    last = steps[-1]
    if steps[:-1] == ["data"] and last in SOURCES and isinstance(node, dict):
        document["data"] = node = _without_source(node, {last: value})
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _child(node: dict[str, JSON] | list[JSON], step: str, override: str, path: str) -> dict[str, JSON] | list[JSON]:
    if isinstance(node, list):
        place = _position(node, step, override)
        child = node[place] = _detailed(node[place])
    else:
        child = node.setdefault(step, {})
        if step == "method":
            child = node[step] = _detailed(child)
    if not isinstance(child, dict | list):
        raise UserError(f"--set {override!r}: {path} is {child!r}, which has no fields")
    return child


def _detailed(value: JSON) -> JSON:
    """A transform given by its name alone, as one with fields."""
    return {"type": value} if isinstance(value, str) else value


def _position(items: list[JSON], step: str, override: str) -> int:
    if step.lstrip("-").isdigit() and -len(items) <= int(step) < len(items):
        return int(step)
    names = [str(i.get("name", i.get("type"))) if isinstance(i, dict) else str(i) for i in items]
    if step in names:
        return names.index(step)
    raise UserError(f"--set {override!r}: no item {step!r}; items: {', '.join(names)}{nearest(step, names)}")
