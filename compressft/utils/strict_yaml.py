"""YAML 1.2's core schema, in which every text means one thing, read within limits and written so that it reads back.

PyYAML follows YAML 1.1, where `yes` and `on` are true, `010` is 8 and `1:30` is 90, and where the last of two equal
keys wins. Here those words are text, a number with a leading zero and a second equal key are mistakes, and a text may
not grow without bound.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from compressft.errors import UserError
from compressft.utils.texts import JSON

# Of a text in characters, of nesting, and of values once aliases are written out.
LONGEST, DEEPEST, MOST = 2**20, 50, 100_000
# Digits of an integer that a field may have; more would cost time before it is refused.
DIGITS = 30
_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_SCALARS = (
    (_NULL, r"~|null|Null|NULL|", "~nN"),
    (_BOOL, r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_INT, r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    (_FLOAT, r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """Knows the core schema's plain scalars and nothing else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own name and form.

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, JSON]:  # type: ignore[override]
        found: dict[str, JSON] = {}
        for key_node, value_node in node.value:
            if key_node.tag != "tag:yaml.org,2002:str":
                raise _Wrong("a key must be text; write it in quotes if it is", key_node.start_mark)
            key = key_node.value
            if key in found:
                raise _Wrong(f"key {key!r} is given twice; keep one", key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read as text, and writes no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Wrong(Exception):
    """What is wrong, and where."""

    def __init__(self, what: str, mark: yaml.Mark) -> None:
        super().__init__(what)
        self.where = f"line {mark.line + 1}, column {mark.column + 1}"


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), [*_first])
_Loader.add_implicit_resolver(_NULL, re.compile(r"\Z"), [""])


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    if len(text) > DIGITS:
        raise _Wrong(f"a number of {len(text)} digits is too long", node.start_mark)
    if re.fullmatch(r"[-+]?0[0-9]+", text):
        raise _Wrong(f"{text!r} is 8 to some and 10 to others; write the number without leading zeros", node.start_mark)
    return int(text, 0)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _boolean(loader: _Loader, node: yaml.ScalarNode) -> bool:
    return node.value.lower() == "true"


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, JSON]:
    return loader.construct_mapping(node)


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[JSON]:
    return [loader.construct_object(item, deep=True) for item in node.value]


_Loader.add_constructor(_INT, _integer)
_Loader.add_constructor(_FLOAT, _number)
_Loader.add_constructor(_BOOL, _boolean)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _sequence)


def read_yaml(text: str, where: str) -> Any:
    """The value of one YAML document; what an alias stands for is a value of its own.

    Args:
        where: begins the messages, such as the file's name.

    Raises:
        UserError: it is no YAML, says something twice or in two ways, or passes a limit.
    """
    try:
        _within_limits(text)
        return _unshared(yaml.load(text, _Loader))
    except _Wrong as error:
        raise UserError(f"{where}: {error.where}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not YAML: {' '.join(str(error).split())}") from None


def _unshared(value: JSON) -> JSON:
    """A copy in which an alias is a value of its own: a change of one must not reach the other."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def write_yaml(value: object) -> str:
    """A text of which `read_yaml`, and any YAML 1.1 or 1.2 parser, makes the same value again."""
    text = _dumped(value, unicode=True)
    # PyYAML writes these as they are and reads them as line breaks.
    return _dumped(value, unicode=False) if any(c in text for c in "\x85\u2028\u2029\ufeff") else text


def _dumped(value: object, unicode: bool) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=unicode, width=110)


def _within_limits(text: str) -> None:
    """Count before anything is built: the parser's events, an alias as often as what it stands for."""
    start = yaml.Mark("text", 0, 0, 0, None, 0)
    if len(text) > LONGEST:
        raise _Wrong(f"{len(text):,} characters; at most {LONGEST:,} are read", start)
    sizes: dict[str, int] = {}
    # Of every collection that is open: its anchor, and how many values it has so far.
    opened: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor, size = getattr(event, "anchor", None), 1
        if getattr(event, "tag", None) is not None:
            raise _Wrong(f"tag {event.tag!r}: tags are not read; write the plain value", event.start_mark)
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((anchor, 1))
            if len(opened) > DEEPEST:
                raise _Wrong(f"nested deeper than {DEEPEST}", event.start_mark)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = opened.pop()
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == name for name, _ in opened):
                raise _Wrong(f"*{anchor} stands inside what it stands for; write it out", event.start_mark)
            size, anchor = sizes.get(str(anchor), 1), None
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor is not None:
            sizes[anchor] = size
        parent, before = opened[-1]
        opened[-1] = (parent, before + size)
        if before + size > MOST:
            raise _Wrong(f"more than {MOST:,} values once aliases are written out", event.start_mark)
