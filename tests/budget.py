"""CPU seconds of every test, its child processes included; those of a folder are held against its budget.

A budget is about what the folder took when it was set, on two cores of an AMD EPYC (Zen 3) that other work shared;
all together they are ten minutes of two such cores. `make test` says where a budget is passed and fails at twice the
budget: busy neighbours do not make it fail, a product of registries does. `CPU_LOG=file` writes every test's seconds,
one JSON list a line.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter

import pytest

BUDGET = {
    # Importing and collecting, all processes.
    "collection": 57,
    "tests/run": 300,
    "tests/export": 190,
    "tests/methods": 100,
    "tests": 110,
    "tests/kernels": 100,
    "tests/passes": 95,
    "tests/adapters": 50,
    "tests/run/report": 32,
    "tests/trust": 35,
    "tests/objectives": 24,
    "tests/model": 24,
    "tests/modules": 16,
    "tests/recipe": 19,
    "tests/reference": 15,
    "tests/tasks": 10,
    "tests/utils": 5,
    "tests/data": 4,
}
# A folder that has none of its own.
OTHER = 30
FAILS = 2


def spent() -> float:
    """CPU seconds, user and system, of this process and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Budget:
    """Adds up in every worker; the controller collects."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> object:
        before = spent()
        try:
            return (yield)
        finally:
            seconds = spent() - before
            self.seconds[item.nodeid.partition("::")[0].rpartition("/")[0]] += seconds
            if log := os.environ.get("CPU_LOG"):
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps([item.nodeid, round(seconds, 3)]) + "\n")

    def pytest_collection_finish(self) -> None:
        self.seconds["collection"] = spent()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: object) -> None:
        self.seconds.update(getattr(node, "workeroutput", {}).get("seconds", {}))

    def over(self, times: float) -> list[str]:
        """Folders that took so many times their budget."""
        return [folder for folder, seconds in self.seconds.items() if seconds > times * BUDGET.get(folder, OTHER)]

    def judged(self) -> bool:
        """Whether this is the run that the budgets are for."""
        everything = self.config.args == self.config.getini("testpaths")
        return everything and not self.config.getoption("all") and not self.config.getoption("collectonly")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["seconds"] = dict(self.seconds)
        elif self.judged() and self.over(FAILS):
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = [f"{folder} {seconds:.0f}" for folder, seconds in self.seconds.most_common()]
        terminalreporter.write_line(f"CPU seconds: {', '.join(rows)}; together {self.seconds.total():.0f}")
        if self.judged():
            for folder in self.over(1):
                fails = "FAILED: " if folder in self.over(FAILS) else ""
                terminalreporter.write_line(
                    f"{fails}{folder} has {BUDGET.get(folder, OTHER)} CPU seconds (tests/budget.py)"
                )
