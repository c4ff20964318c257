"""The share of cases: every name is in it once, as many as the longest list has, and a tree draws the same again."""

import itertools
from types import SimpleNamespace

import pytest

from tests import budget, share
from tests.tiny import TINY


class Case:
    """What the selection looks at of a test's case."""

    def __init__(self, marks=("parametrize",), **params):
        self.nodeid = f"file::test[{'-'.join(map(str, params.values()))}]"
        self.callspec, self.marks = SimpleNamespace(params=params), marks

    def iter_markers(self, name):
        return [mark for mark in self.marks if mark == name]

    def get_closest_marker(self, name):
        return name if name in self.marks else None


def product(**lists):
    marks = ("parametrize",) * len(lists)
    return [Case(marks, **dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]


@pytest.mark.parametrize(("methods", "passes"), [(14, 14), (42, 42), (3, 20)])
def test_a_product_of_names_grows_with_its_longest_list(methods, passes):
    lists = {"method": [f"m{i}" for i in range(methods)], "one": [f"p{i}" for i in range(passes)]}
    kept = share.cover(product(**lists))
    assert len(kept) == max(methods, passes)
    for name, values in lists.items():
        assert {case.callspec.params[name] for case in kept} == set(values)


def test_one_family_of_each_structure():
    cases = product(family=list(TINY))
    kept = set(cases) - share.left_out(cases)
    assert {share.STRUCTURE.get(case.callspec.params["family"]) or case.callspec.params["family"] for case in kept} == {
        "bert",
        "distilbert",
        "llama",
        "gpt2",
    }
    assert len(kept) == 4


def test_numbers_and_shapes_stay_whole():
    cases = product(rows=[1, 2, 3], shape=[(1, 2), (3, 4)])
    assert not share.left_out(cases)
    one_list = [Case(name=name) for name in "abcdef"]
    assert not share.left_out(one_list)


def test_full_cases_are_left_out():
    full = Case(("parametrize", "full"), name="a")
    assert share.left_out([full, Case(name="b")]) == {full}


def in_file(number, mark, count=3):
    """Cases of a file that is marked, or whose cases are."""
    module = SimpleNamespace(pytestmark=SimpleNamespace(name=mark)) if mark else SimpleNamespace()
    cases = [Case(("dear",), name=f"{number}-{i}") for i in range(count)]
    for case in cases:
        case.module, case.nodeid = module, f"file-{number}::{case.nodeid}"
    return cases


def test_a_third_of_what_is_dear_is_drawn_whole_files_where_the_file_is_marked():
    files = [in_file(number, "dear") for number in range(9)]
    cases = [case for number in range(9, 12) for case in in_file(number, None)]
    cheap = [Case(name="cheap")]
    rest = share.left_out([*itertools.chain(*files), *cases, *cheap])
    assert sorted(len(set(file) & rest) for file in files) == [0] * 3 + [3] * 6
    assert len(set(cases) & rest) == 6
    assert not set(cheap) & rest
    assert not share.left_out([*itertools.chain(*files), *cases, *cheap], named=True)


def test_trees_draw_other_dear_files(monkeypatch):
    """None is left out for good."""
    files = [in_file(number, "dear", 1) for number in range(6)]
    drawn = set()
    for tree in range(40):
        monkeypatch.setattr(share, "tree", lambda tree=tree: tree)
        drawn |= set(itertools.chain(*files)) - share.left_out([*itertools.chain(*files)])
    assert drawn == set(itertools.chain(*files))


def test_a_tree_draws_the_same_again(monkeypatch):
    def kept():
        return [one for one in share.drawn(3, range(40), (7,)) if isinstance(one, int)]

    first = kept()
    assert len(first) == 4 and first[0] == 7 and first == kept()
    draws = set()
    for tree in "abcdef":
        monkeypatch.setattr(share, "tree", lambda tree=tree: tree)
        draws.add(tuple(kept()))
    assert len(draws) > 1


def test_folders_over_their_budget(monkeypatch):
    monkeypatch.setattr(budget, "BUDGET", {"tests/a": 10, "tests/b": 10})
    found = budget.Budget(None)
    found.seconds.update({"tests/a": 15.0, "tests/b": 25.0, "tests/c": 9.0, "tests/new": 2.5 * budget.OTHER})
    assert found.over(1) == ["tests/a", "tests/b", "tests/new"]
    assert found.over(2) == ["tests/b", "tests/new"]


def test_the_budgets_are_ten_minutes_of_two_cores():
    assert sum(budget.BUDGET.values()) <= 20 * 60
