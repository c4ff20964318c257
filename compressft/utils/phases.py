"""What a run spends its seconds on, and how far it is where something takes longer than ten of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from compressft.utils.texts import read_json

# The phases of a run, in the order in which a report shows them; what is in none of them is "other".
PHASES = (
    "loading", "search", "training", "evaluation", "saving", "export", "verification", "latency", "analyses", "report"
)  # fmt: skip
OTHER = "other"
# Where a run directory keeps the seconds so far.
SECONDS = "memo/seconds.json"
# What a second export of the same run spends again.
AGAIN = ("export", "verification", "latency", "analyses", "report")
# Seconds between two lines where no terminal shows a bar, and until a terminal shows one.
PATIENCE, BLINK = 10.0, 1.0

T = TypeVar("T")


class Clock:
    """Seconds by phase.

    Phases nest, and what is inside another counts there alone: all together are the seconds since the clock began.

    Args:
        loading: seconds that went by before there was a clock.
    """

    def __init__(self, loading: float = 0.0) -> None:
        self._spent = {"loading": loading}
        self._open = [OTHER]
        self._mark = time.perf_counter()

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what earlier sessions of the same run have spent."""
        for name, value in seconds.items():
            self._spent[name] = self._spent.get(name, 0.0) + value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, seconds count as this phase's."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """By phase so far; those that took none are left out."""
        self._charge()
        return {name: self._spent[name] for name in (*PHASES, OTHER) if self._spent.get(name)}

    def _charge(self) -> None:
        now = time.perf_counter()
        self.add({self._open[-1]: now - self._mark})
        self._mark = now


@dataclass
class _Watch:
    console: Console
    clock: Clock
    # Whether something shows already how far it is; what happens inside it says nothing.
    told: threading.Lock = field(default_factory=threading.Lock)


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(console: Console, clock: Clock) -> Iterator[Clock]:
    """Inside, `phase` counts on this clock, and `steps` and `doing` tell this console."""
    token = _watch.set(_Watch(console, clock))
    try:
        yield clock
    finally:
        _watch.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, seconds count as this phase's, where somebody watches. Also a decorator."""
    watch = _watch.get()
    if watch is None:
        yield
        return
    with watch.clock.phase(name):
        yield


def seconds() -> dict[str, float]:
    """Seconds by phase so far; empty where nobody watches."""
    watch = _watch.get()
    return {} if watch is None else watch.clock.seconds()


def keep(path: Path) -> None:
    """Write the seconds so far to a file, from which a resumed run goes on counting; not where nobody watches."""
    if _watch.get() is None:
        return
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(json.dumps(seconds()), encoding="utf-8")
    staging.replace(path)


def kept(path: Path) -> dict[str, float]:
    """What `keep` wrote; empty where there is nothing."""
    return read_json(path) if path.is_file() else {}


def steps(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Go through items; where that takes longer than `PATIENCE`, the console is told how far it is and what is left.

    Args:
        what: said of it, such as "verifying".
        total: how many items there are, where they do not say themselves.
    """
    count = len(items) if isinstance(items, Sized) else total
    with _telling(what, count) as teller:
        for done, item in enumerate(items):
            teller.done = done
            yield item
            teller.done = done + 1


@contextmanager
def doing(what: str) -> Iterator[None]:
    """As `steps`, of something that cannot be counted."""
    with _telling(what, None):
        yield


class _Teller:
    """How far something is: a bar on a terminal, else a line every `PATIENCE` seconds, from a thread of its own."""

    def __init__(self, console: Console, what: str, total: int | None) -> None:
        self.console = console
        self.what = what
        self.total = total
        self.done = 0
        self._begun = time.perf_counter()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._bar if console.is_terminal else self._lines, daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Say nothing more."""
        self._over.set()
        self._thread.join()

    def line(self) -> str:
        """How far it is now."""
        spent = time.perf_counter() - self._begun
        if not self.total:
            return f"{self.what}: {spent:.0f} s"
        left = f"  ETA {spent / self.done * (self.total - self.done):.0f} s" if self.done else ""
        return f"{self.what}: {self.done}/{self.total}  {spent:.0f} s{left}"

    def _lines(self) -> None:
        while not self._over.wait(PATIENCE):
            self.console.print(self.line(), highlight=False, soft_wrap=True)

    def _bar(self) -> None:
        if self._over.wait(BLINK):
            return
        with Progress(*columns(self.what), console=self.console, transient=True) as progress:
            bar = progress.add_task("", total=self.total, completed=self.done)
            while not self._over.wait(0.5):
                progress.update(bar, completed=self.done)


def columns(what: str) -> tuple[ProgressColumn, ...]:
    """What a bar shows: a name, how far, for how long, how long yet, and the task's description."""
    return (
        TextColumn(f"[bold]{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )


class _Silence:
    """A teller that nobody hears."""

    done = 0


@contextmanager
def _telling(what: str, total: int | None) -> Iterator[_Teller | _Silence]:
    watch = _watch.get()
    if watch is None or watch.console.quiet or not watch.told.acquire(blocking=False):
        yield _Silence()
        return
    teller = _Teller(watch.console, what, total)
    teller.start()
    try:
        yield teller
    finally:
        teller.stop()
        watch.told.release()


@contextmanager
def telling_itself() -> Iterator[None]:
    """Inside, something else shows how far it is: `steps` and `doing` say nothing."""
    watch = _watch.get()
    if watch is None or not watch.told.acquire(blocking=False):
        yield
        return
    try:
        yield
    finally:
        watch.told.release()
