"""Correctness, then times: one document for a list of operators on one device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor

from compressft_kernels import dispatch
from compressft_kernels.benchmark import correctness, shapes, timing
from compressft_kernels.benchmark.cases import BOTH, FORWARD, PASSES, Case, Operands, Way
from compressft_kernels.benchmark.correctness import Row

# What more than torch offers: (case, device) -> ways by name.
Peers = Callable[[Case, torch.device], Mapping[str, Way]]
EAGER, COMPILED = "eager", "torch.compile"


def default_dtype(device: torch.device) -> torch.dtype:
    """What is timed: float32 on the CPU, else the half precision that the device multiplies."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def compiled(case: Case, device: torch.device) -> Way:
    """torch.compile of the eager composition.

    On CUDA with all of its tuning, but without CUDA graphs: those would copy the rotated inputs, and spare only time
    on the host, which is not in the device's times.
    """
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    return Way(torch.compile(case.naive, mode=mode, dynamic=False), compiles=True)


def calls(case: Case, way: Way, copies: Sequence[Operands], which: str) -> list[timing.Call]:
    """What is timed of a way: a call per copy of the operands."""
    return [_call(case, way, operands, which) for operands in copies]


def _call(case: Case, way: Way, operands: Operands, which: str) -> timing.Call:
    names = case.leaves if way.leaves is None else way.leaves
    o = operands | ({} if way.prepare is None else way.prepare(operands))
    o |= {name: o[name].detach().requires_grad_(which == BOTH) for name in names}
    change = case.between
    before = None if change is None else lambda: change(o)

    def forward() -> Tensor:
        with way.within(), torch.no_grad():
            return way.call(o)

    if which == FORWARD:
        return timing.Call(forward, before)
    dy, leaves = torch.randn_like(forward()), [o[name] for name in names]

    def both() -> tuple[Tensor, ...]:
        with way.within():
            y = way.call(o)
            return (y, *torch.autograd.grad(y, leaves, dy))

    return timing.Call(both, before)


def outcome(case: Case, call: Callable[[Operands], Tensor], operands: Operands, which: str) -> dict[str, Tensor]:
    """The output, and of both passes the gradients, to be compared."""
    if which == BOTH:
        return correctness.results(call, operands, case.leaves)
    with torch.no_grad():
        return {"y": call(operands)}


class Compiling:
    """What compiling the peers may still take, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def call(self, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self.left -= time.perf_counter() - start


def measure_case(
    case: Case, which: str, device: torch.device, dtype: torch.dtype, ceilings: Mapping[str, float], *,
    more: Mapping[str, Way] | None = None, compiling: Compiling | None = None, wrong: str | None = None,
    seconds: float = 0.1,
) -> Row:  # fmt: skip
    """The row of one case and pass.

    Args:
        more: peers besides the case's own.
        compiling: the time for compiling peers; None leaves those out.
        wrong: why the operator is known to be wrong; its row gets no ratio.
        seconds: time for each way.
    """
    dtype = case.dtype or dtype
    operands = case.make(device, dtype, 0)
    number = timing.copies(timing.held(operands), device)
    copies = [operands, *(case.make(device, dtype, seed) for seed in range(1, number))]
    ways = {"ours": Way(case.ours), EAGER: Way(case.naive), **case.peers, **(more or {})}
    skipped: dict[str, str] = {}
    if device.type == "cpu" and ways.pop("FlexAttention", None) is not None:
        skipped["FlexAttention"] = "not for training on the CPU"
    works: dict[str, list[timing.Call]] = {}

    def ready(name: str) -> None:
        try:
            timed = calls(case, ways[name], copies, which)
            timed[0].run()
            works[name] = timed
        except Exception as error:  # out of memory, no compiler, no kernel for this shape
            skipped[name] = correctness.brief(error)

    if compiling is not None:
        # Each case again: beyond eight variants of a function torch runs it uncompiled, and says nothing.
        torch._dynamo.reset()
        if case.compile:
            ways[COMPILED] = compiled(case, device)
    for name, way in ways.items():
        if not way.compiles:
            ready(name)
        elif compiling is not None and compiling.left > 0:
            compiling.call(partial(ready, name))
        else:
            skipped[name] = "not compiled" if compiling is None else "the time for compiling was spent"
    memory_bound = 1e3 * case.bytes(which, dtype.itemsize) / ceilings["bytes_per_second"]
    ideal = max(memory_bound, 1e3 * case.flops[which] / ceilings["flops_per_second"])
    row: Row = {"operation": case.operation, "case": case.name, "pass": which, "ideal_ms": ideal}
    row |= {"bound_by": "bytes" if ideal == memory_bound else "flops"}
    row |= {"ratio": None, "ratio_eager": None, "roofline": None}
    if "ours" not in works:
        return row | {"wrong": wrong or skipped.pop("ours"), "ms": None, "peers": {}, "skipped": skipped}
    if wrong is None and EAGER in works:
        try:
            got, want = (outcome(case, call, operands, which) for call in (case.ours, case.naive))
            wrong = correctness.differs(got, want)
            del got, want
        except torch.cuda.OutOfMemoryError:
            wrong = None  # it has been checked at smaller sizes
    memory = {name: timing.peak_extra(timed[0].run, device) for name, timed in works.items()}
    times = timing.medians(works, device, seconds)
    mine = times.pop("ours")
    row |= {"ms": mine.ms, "least_ms": mine.least_ms, "host_ms": mine.host_ms}
    row |= {"samples": mine.samples, "copies": number, "wrong": wrong}
    row["peak_extra_bytes"] = memory["ours"]
    if which == BOTH:
        row["saved"] = {name: _saved(case, ways[name].call, operands) for name in ("ours", EAGER) if name in works}
    row["peers"] = {
        name: {
            "ms": t.ms,
            "least_ms": t.least_ms,
            "host_ms": t.host_ms,
            "peak_extra_bytes": memory[name],
            "same": ways[name].same,
        }
        for name, t in times.items()
    }
    row["skipped"] = skipped
    best = min((name for name in times if ways[name].same), key=lambda name: times[name].ms, default=None)
    row["best_peer"] = best
    if wrong is None and best is not None:
        # The ceilings are those of the device's default dtype.
        row |= {"ratio": times[best].ms / mine.ms, "roofline": None if case.dtype else ideal / mine.ms}
        row["ratio_eager"] = times[EAGER].ms / mine.ms if EAGER in times else None
    return row


def _saved(case: Case, call: Callable[[Operands], Tensor], operands: Operands) -> dict[str, int]:
    o = operands | {name: operands[name].detach().requires_grad_() for name in case.leaves}
    return timing.saved(lambda: call(o), o, case.weight)


def _checked(
    operations: Sequence[str], checks: Sequence[Case] | None, device: torch.device, dtypes: Sequence[torch.dtype]
) -> list[Row]:
    """The correctness suite; of the shipped checks on CUDA in processes."""
    wanted = [case if case.operation in operations else None for case in checks or shapes.checks()]
    if checks is None and device.type == "cuda":
        return correctness.suite_in_processes(wanted, device, dtypes, max(1, min(8, (os.cpu_count() or 2) // 2)))
    return correctness.suite([case for case in wanted if case is not None], device, dtypes)


def measure(
    operations: Sequence[str] = dispatch.OPERATIONS, device: torch.device | str = "cpu", *, quick: bool = False,
    cases: Sequence[Case] | None = None, checks: Sequence[Case] | None = None, more: Peers | None = None,
    tune: Callable[[list[Case]], bool] | None = None, compile_seconds: float = 120.0, seconds: float = 420.0,
    say: Callable[[str], None] = lambda line: None,
) -> Row:  # fmt: skip
    """Check, then time.

    Args:
        operations: of `dispatch.OPERATIONS`.
        quick: small shapes, one dtype, no peers to compile: seconds instead of minutes.
        cases, checks: what is timed and checked, instead of what `shapes` has for the device.
        more: peers that need more than torch.
        tune: called with the right operators' cases before they are timed; says whether it changed any settings.
        compile_seconds: what compiling the peers may take in all.
        seconds: after so many no further case is begun; what is left is named in the document.
        say: told what is under way.

    Returns:
        device, dtype, threads, ceilings, correctness (rows), wrong (operation -> reason), rows (see `measure_case`),
        not_measured, seconds.

    Raises:
        ValueError: an operation that is none.
    """
    unknown = [name for name in operations if name not in dispatch.OPERATIONS]
    if unknown:
        raise ValueError(f"operation {unknown[0]!r}; there are {', '.join(dispatch.OPERATIONS)}")
    start, where = time.perf_counter(), torch.device(device)
    cuda, dtype = where.type == "cuda", default_dtype(where)
    if cases is None:
        cases = shapes.quick() if quick else shapes.cuda() if cuda else shapes.cpu()
    # In turns, so that if the time is up no operator is left out.
    queues = [[case for case in cases if case.operation == name] for name in operations]
    chosen = [case for turn in zip_longest(*queues) for case in turn if case is not None]
    say("checking against float64")
    every = [d for d in (torch.float32, torch.float16, torch.bfloat16) if d != torch.bfloat16 or dtype != torch.float16]
    verdicts = _checked(operations, checks, where, [dtype] if quick else every)
    wrong = correctness.red(verdicts)
    if tune is not None and tune([case for case in chosen if case.operation not in wrong]):
        say("checking again with the tuned settings")
        verdicts += [row | {"tuned": True} for row in _checked(operations, checks, where, [dtype])]
        wrong = correctness.red(verdicts)
    say("measuring what the device reaches")
    ceilings = timing.ceilings(where, dtype, quick)
    compiling = None if quick else Compiling(compile_seconds)
    each = 0.01 if quick else 0.06 if cuda else 0.4
    rows, left = [], []
    for case in chosen:
        for which in PASSES:
            name = f"{case.operation} {case.name}, {which}"
            if time.perf_counter() - start > seconds:
                left.append(name)
                continue
            say(name)
            peers = more(case, where) if more is not None else None
            known = wrong.get(case.operation)
            rows.append(
                measure_case(
                    case, which, where, dtype, ceilings, more=peers, compiling=compiling, wrong=known, seconds=each
                )
            )
            if cuda:
                torch.cuda.empty_cache()  # the next case's tensors are of other sizes
    return {
        "device": torch.cuda.get_device_name(where) if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "ceilings": ceilings,
        "correctness": verdicts,
        "wrong": wrong,
        "rows": rows,
        "not_measured": left,
        "seconds": time.perf_counter() - start,
    }


def _times(ratio: float | None, wrong: bool) -> str:
    return "wrong" if wrong else "-" if ratio is None else f"{ratio:.2f}x"


def summary(document: Row) -> dict[str, list[dict[str, str]]]:
    """The rows to print, by operation. A wrong one's have no ratio; why, the document's and the rows' `wrong` say."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in document["rows"]:
        wrong, extra = row["wrong"] is not None, row.get("peak_extra_bytes")
        printed = {
            "case": row["case"],
            "pass": "fwd" if row["pass"] == FORWARD else "fwd+bwd",
            "ms": "-" if row["ms"] is None else f"{row['ms']:.3g}",
            "best peer": row.get("best_peer") or "-",
            "x best": _times(row["ratio"], wrong),
            "x eager": _times(row["ratio_eager"], wrong),
            "roofline": "-" if row["roofline"] is None else f"{row['roofline']:.0%}",
        }
        if extra is not None:
            printed["extra MiB"] = f"{extra / 2**20:.1f}"
        tables.setdefault(row["operation"], []).append(printed)
    return tables
