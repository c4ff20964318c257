"""Find the block sizes, warps and stages that are fastest on this device, and write them into the kernels' table.

For each row of the table that timed cases fall on, a few neighbours of its configuration are tried on some of them. The
fastest stays that gives the eager composition's results and does not spill. The thresholds are tried after the rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from compressft_kernels import dispatch, launch_triton
from compressft_kernels.benchmark import correctness, run, timing
from compressft_kernels.benchmark.cases import BOTH, Case

# A change must gain this much, or it is noise; a case counts so many times at most; a case's samples take so long.
GAIN, CASES, SECONDS = 0.98, 3, 0.03
THRESHOLDS = (None, 64, 128, 256, 512, 1024, 4096)
# case -> milliseconds with the table as it is now; None where that fails, spills or gives other results.
Score = Callable[[Case], float | None]


def neighbours(config: Mapping[str, int]) -> list[dict[str, int]]:
    """Each block size doubled and halved, one stage more and less, the other number of warps."""
    found, config = [], dict(config)
    for name, value in config.items():
        if name.startswith("BLOCK_"):
            found += [config | {name: size} for size in (value * 2, value // 2) if 16 <= size <= 256]
        elif name == "num_stages":
            found += [config | {name: count} for count in (value + 1, value - 1) if 1 <= count <= 6]
        elif name == "num_warps":
            found.append(config | {name: 8 if value == 4 else 4})
    return found


@contextmanager
def watching() -> Iterator[set[Any]]:
    """Collects the configurations (by identity) and the thresholds (by name) that choices inside fall on."""
    used: set[Any] = set()
    configuration, limit = dispatch.configuration, dispatch.limit

    def chosen(kernel: str, where: list[str], **facts: Any) -> dict[str, int]:
        config = configuration(kernel, where, **facts)
        used.add(id(config))
        return config

    def asked(name: str, where: list[str]) -> Any:
        used.add(name)
        return limit(name, where)

    dispatch.configuration, dispatch.limit = chosen, asked
    try:
        yield used
    finally:
        dispatch.configuration, dispatch.limit = configuration, limit


def total(score: Score, cases: Sequence[Case], base: Sequence[float]) -> float | None:
    """The geometric mean of times over their base; None if one case fails."""
    logs = []
    for case, before in zip(cases, base, strict=True):
        now = score(case)
        if now is None:
            return None
        logs.append(math.log(now / before))
    return math.exp(sum(logs) / len(logs))


def tune(
    cases: Sequence[Case], entry: str, base: str, score: Score, seconds: float, say: Callable[[str], None] = print
) -> list[str]:
    """Tune `dispatch.TABLE[entry]`, a copy of the entry `base` if there is none yet; a line for every change.

    The entry holds the kernels that the cases use, and is dropped if nothing has been found for it.
    """
    table, end = dispatch.TABLE, time.perf_counter() + seconds
    new = entry not in table
    if new:
        table[entry] = deepcopy(table[base])
    falls: dict[Any, list[Case]] = {}
    for case in cases:
        with watching() as used:
            if score(case) is None:
                continue
        for place in used:
            falls.setdefault(place, []).append(case)
    kernels = {kernel: rows for kernel, rows in table[entry].items() if kernel != "limits"}
    knobs = [(kernel, row, "config") for kernel, rows in kernels.items() for row in rows if id(row["config"]) in falls]
    limits = table[entry].get("limits", {})
    changes: list[str] = []
    for place, (kernel, holder, key) in enumerate([*knobs, *(("limits", limits, name) for name in limits)]):
        is_row = kernel != "limits"
        within = falls.get(id(holder[key]) if is_row else key, [])
        # Spread over the sizes; thresholds are about sizes, so all of theirs count.
        within = within[:: max(1, len(within) // CASES)][:CASES] if is_row else within
        others = neighbours(holder[key]) if is_row else [value for value in THRESHOLDS if value != holder[key]]
        share = time.perf_counter() + (end - time.perf_counter()) / (len(knobs) + len(limits) - place)
        before = [score(case) for case in within]
        times = [ms for ms in before if ms is not None]
        if not within or len(times) < len(before):
            continue
        kept, best = holder[key], GAIN
        for other in others:
            if time.perf_counter() > share:
                break
            holder[key] = other
            found = total(score, within, times)
            if found is not None and found < best:
                best, kept, old = found, other, kept
                changes.append(f"{kernel} {holder.get('when', key)}: {old} -> {other}, {found:.2f} of the time")
                say(changes[-1])
        holder[key] = kept
    if new and not changes:
        del table[entry]
    elif new:
        untouched = [
            k for k, rows in kernels.items() if not any(row is holder for _, holder, _ in knobs for row in rows)
        ]
        for kernel in untouched:
            del table[entry][kernel]
    return changes


class Timer:
    """The score on a GPU: both passes of `case`, correct and without spills."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, case: Case) -> float | None:
        spills: list[int] = []

        def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
            spills.append(getattr(kernel[grid](*args, **options), "n_spills", None) or 0)

        dtype = case.dtype or self.dtype
        operands = case.make(self.device, dtype, 0)
        try:
            # In one thread, so that the handler sees the launches of backward too.
            with torch.autograd.set_multithreading_enabled(False), launch_triton.intercepting(launch):
                got = run.outcome(case, case.ours, operands, BOTH)
            if any(spills) or correctness.differs(got, run.outcome(case, case.naive, operands, BOTH)) is not None:
                return None
            number = timing.copies(timing.held(operands), self.device)
            copies = [operands, *(case.make(self.device, dtype, seed) for seed in range(1, number))]
            timed = {"ours": run.calls(case, run.Way(case.ours), copies, BOTH)}
            return timing.medians(timed, self.device, SECONDS)["ours"].ms
        except Exception:  # it does not compile, does not fit, or there is no memory for eager PyTorch
            return None


def write(table: Mapping[str, Any], path: Path) -> None:
    """The table as JSON with a line for each row."""
    entries = []
    for entry, kernels in table.items():
        parts = []
        for kernel, rows in kernels.items():
            if kernel == "limits":
                parts.append(f"  {json.dumps(kernel)}: {json.dumps(rows)}")
                continue
            lines = ",\n".join(f"   {json.dumps(row)}" for row in rows)
            parts.append(f"  {json.dumps(kernel)}: [\n{lines}\n  ]")
        entries.append(f" {json.dumps(entry)}: {{\n" + ",\n".join(parts) + "\n }")
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
