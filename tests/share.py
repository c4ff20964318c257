"""Which cases `make test` runs: of a product of names every one once, drawn by the tree's hash. `--all` runs all.

Names (families, methods, passes, kinds) multiply as registries grow, and dtypes multiply with every case of a kernel.
Numbers and shapes do not, and cost little: they stay whole, but where Triton's interpreter makes each one dear.
Of what is marked `dear` (an export, a run or a compilation of its own: some five CPU seconds) a third is drawn: whole
files where the file is marked, for their cases share what costs, else cases.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Families of one structure are alike in everything that the code looks at: one row of `families.py`.
STRUCTURE = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), "bert"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "llama"),
}
# Here numbers and shapes are drawn like names, and all cases are dear.
INTERPRETED = "tests/kernels/interpreted/"
# One of so many that are dear runs.
DEAR = 3
Value = tuple[str, Any]


@cache
def tree() -> str:
    """A hash of all sources: the same tree draws the same cases everywhere."""
    digest = hashlib.sha256()
    for folder in ("compressft", "kernels", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def rank(name: object) -> str:
    """Orders what can be drawn."""
    return hashlib.sha256(f"{tree()} {name}".encode()).hexdigest()


def drawn(number: int, among: Iterable[Any], always: Sequence[Any] = ()) -> list[Any]:
    """Values for `parametrize`: all of `among`, of which `make test` runs `always` and so many others."""
    among = list(among)
    kept = [*always, *sorted((one for one in among if one not in always), key=rank)[:number]]
    rest = [one for one in among if one not in kept]
    return kept + [pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.full) for one in rest]


def values(item: pytest.Function) -> frozenset[Value]:
    """What a case has of each parameter; families stand for their structure, and what is no name for itself alone."""
    other = repr if item.nodeid.startswith(INTERPRETED) else lambda value: item.nodeid
    return frozenset(
        (name, STRUCTURE.get(value, value) if isinstance(value, str | bool | torch.dtype) else other(value))
        for name, value in item.callspec.params.items()
    )


def is_product(item: pytest.Function) -> bool:
    """Whether its number of cases multiplies: parametrised more than once, or over families."""
    return hasattr(item, "callspec") and (
        "family" in item.callspec.params or len([*item.iter_markers("parametrize")]) > 1
    )


def cover(items: Sequence[pytest.Function]) -> set[pytest.Function]:
    """So few of one function's cases that every value of every parameter is in one of them."""
    having = {item: values(item) for item in sorted(items, key=lambda item: rank(item.nodeid))}
    missing, chosen = set().union(*having.values()), set()
    while missing:
        best = max(having, key=lambda item: len(having[item] & missing))
        chosen.add(best)
        missing -= having[best]
    return chosen


def unit(item: Any) -> tuple[str, str] | None:
    """Kind and name of what is drawn together of what is dear; None where the case is not."""
    if item.nodeid.startswith(INTERPRETED):
        return "interpreted", item.nodeid
    if not item.get_closest_marker("dear"):
        return None
    marks = getattr(item.module, "pytestmark", [])
    whole = any(mark.name == "dear" for mark in (marks if isinstance(marks, list) else [marks]))
    return ("file", item.nodeid.partition("::")[0]) if whole else ("case", item.nodeid)


def spared(items: Iterable[Any]) -> set[Any]:
    """What is not drawn of what is dear, of each kind of unit by itself."""
    kinds: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        if found := unit(item):
            kinds[found[0]][found[1]].append(item)
    rest = set()
    for units in kinds.values():
        for name in sorted(units, key=rank)[math.ceil(len(units) / DEAR) :]:
            rest.update(units[name])
    return rest


def left_out(items: Sequence[pytest.Item], named: bool = False) -> set[pytest.Item]:
    """What `make test` leaves to `make test-all`.

    Args:
        named: files are named on the command line; what is dear in them is wanted.
    """
    rest = {item for item in items if item.get_closest_marker("full")}
    products = defaultdict(list)
    for item in items:
        if item not in rest and is_product(item):
            products[item.nodeid.partition("[")[0]].append(item)
    for cases in products.values():
        rest |= set(cases) - cover(cases)
    return rest if named else rest | spared(item for item in items if item not in rest)


class Share:
    """The selection as a plugin; what is named on the command line (`file::test`) runs whole."""

    def pytest_report_header(self, config: pytest.Config) -> str:
        return f"cases: {'all' if config.getoption('all') else 'a share'}, drawn by the tree {tree()}"

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if config.getoption("all") or any("::" in argument for argument in config.args):
            return
        rest = left_out(items, any(argument.endswith(".py") for argument in config.args))
        config.hook.pytest_deselected(items=[item for item in items if item in rest])
        items[:] = [item for item in items if item not in rest]
