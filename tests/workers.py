"""How files are dealt to processes: what shares a fixture stays together, and what takes longest comes first."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling

# Its exported files are made once for the folder; a launch and processes to wait for should not be the last.
TOGETHER = "tests/export"
FIRST = (
    TOGETHER,
    "tests/kernels/test_interpreted.py",
    "tests/run/test_run.py",
    "tests/run/test_processes.py",
    "tests/kernels/test_ahead.py",
    "tests/methods/test_compiled.py",
    "tests/run/test_resume.py",
)


class ByCost(LoadFileScheduling):
    """`--dist loadfile` but for the above."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER if nodeid.startswith(f"{TOGETHER}/") else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: object) -> None:
        first = next((scope for scope in FIRST if scope in self.workqueue), None)
        if first:
            self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)
