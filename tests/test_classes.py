"""Chains of inheritance are short: a base, at most one abstract class of a family, and the final one."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 3
# The base of everything that a recipe says; what it gives is pydantic's, as we want it.
UNCOUNTED = ("compressft.utils.strict", "Strict")
Name = tuple[str, str]


def bases(source: str, module: str) -> dict[Name, list[Name]]:
    """Class -> its bases, by the modules that they are imported from."""
    tree = ast.parse(source)
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            known |= {one.asname or one.name: (node.module, one.name) for one in node.names}
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    known |= {name: (module, name) for name in classes}
    return {
        (module, name): [known[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in known]
        for name, node in classes.items()
    }


def chains(classes: dict[Name, list[Name]]) -> dict[Name, list[str]]:
    """The longest chain of these classes from each up, its own name first."""

    @cache
    def chain(one: Name) -> list[str]:
        if one not in classes or one == UNCOUNTED:
            return []
        return [one[1], *max(map(chain, classes[one]), key=len, default=[])]

    return {one: chain(one) for one in classes}


def ours() -> dict[Name, list[Name]]:
    found = {}
    for path in (ROOT / "compressft").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found |= bases(path.read_text(encoding="utf-8"), module)
    return found


def test_no_chain_is_longer_than_base_family_and_final_class():
    found = chains(ours())
    assert len(found) > 150
    assert found["compressft.passes.magnitude", "Magnitude"] == ["Magnitude", "Masked", "Transform"]
    assert [" <- ".join(chain) for chain in found.values() if len(chain) > LONGEST] == []


def test_a_fourth_class_would_be_seen():
    source = "from compressft.passes.magnitude import Magnitude\nclass Larger(Magnitude): ..."
    found = chains(ours() | bases(source, "compressft.passes.larger"))
    assert len(found["compressft.passes.larger", "Larger"]) > LONGEST
