"""Seconds by phase add up, and what takes long says how far it is."""

import io
import threading
import time

import pytest
from rich.console import Console

from compressft.utils import phases
from compressft.utils.phases import Clock, doing, keep, kept, phase, seconds, steps, telling_itself, watched


def plain() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_phases_add_up_to_the_time_that_went_by():
    """What is inside another phase counts there alone, also where it ends in an error."""
    begun = time.perf_counter()
    with watched(plain(), Clock(loading=2.0)) as clock:
        with phase("training"):
            time.sleep(0.02)
            with pytest.raises(ValueError), phase("evaluation"):
                time.sleep(0.03)
                raise ValueError
            time.sleep(0.02)
        time.sleep(0.01)
        found = clock.seconds()
    spent = time.perf_counter() - begun
    assert list(found) == ["loading", "training", "evaluation", "other"]
    assert found["loading"] == 2.0
    assert 0.04 <= found["training"] < 0.04 + spent - 0.08 + 1e-3
    assert found["evaluation"] >= 0.03 and found["other"] >= 0.01
    assert sum(found.values()) - 2.0 == pytest.approx(spent, abs=5e-3)


def test_earlier_sessions_count(tmp_path):
    path = tmp_path / "memo" / "seconds.json"
    assert kept(path) == {}
    with watched(plain(), Clock()), phase("training"):
        time.sleep(0.02)
        keep(path)
    with watched(plain(), Clock()) as clock:
        clock.add(kept(path))
        with phase("training"):
            time.sleep(0.02)
        assert clock.seconds()["training"] >= 0.04
    assert [p.name for p in path.parent.iterdir()] == ["seconds.json"]


def test_without_anybody_watching_nothing_is_counted_or_written(tmp_path):
    with phase("training"):
        assert seconds() == {}
    keep(tmp_path / "seconds.json")
    assert not list(tmp_path.iterdir())
    assert list(steps(iter("abc"), "spelling")) == ["a", "b", "c"]


def test_a_loop_that_takes_long_says_how_far_it_is(monkeypatch):
    """Also within one item that takes long; what is inside says nothing of its own."""
    monkeypatch.setattr(phases, "PATIENCE", 0.05)
    console = plain()
    with watched(console, Clock()):
        for item in steps([1, 2, 3, 4], "counting"):
            for _ in steps(range(3), "inside"):
                time.sleep(0.06 if item == 3 else 0.0)
    lines = said(console)
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("counting: 2/4  ") and "ETA" in line for line in lines)


def test_what_cannot_be_counted_says_that_it_goes_on(monkeypatch):
    monkeypatch.setattr(phases, "PATIENCE", 0.05)
    console = plain()
    with watched(console, Clock()), doing("exporting"):
        time.sleep(0.08)
    assert said(console) == ["exporting: 0 s"]


def test_quick_loops_and_loops_inside_a_bar_say_nothing(monkeypatch):
    console = plain()
    with watched(console, Clock()):
        assert list(steps(range(3), "quick")) == [0, 1, 2]
        monkeypatch.setattr(phases, "PATIENCE", 0.01)
        with telling_itself():
            for _ in steps(range(2), "slow"):
                time.sleep(0.03)
    assert said(console) == []


def test_nothing_is_left_of_a_loop_that_is_left_early(monkeypatch):
    monkeypatch.setattr(phases, "PATIENCE", 0.01)
    before = threading.active_count()
    console = plain()
    with watched(console, Clock()):
        for _ in steps(range(5), "left"):
            break
        assert threading.active_count() == before
        for _ in steps(range(1), "the next"):
            time.sleep(0.03)
    # A busy machine may have said the first loop before it was left; nothing of it comes afterwards.
    assert said(console)[-1].startswith("the next: 0/1")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(phases, "BLINK", 0.01)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with watched(console, Clock()):
        for _ in steps(range(3), "verifying"):
            time.sleep(0.1)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "verifying" in shown and "/3" in shown and "ETA" in shown
