"""Times, memory and the device's ceilings. On CUDA of the device alone, with inputs that its L2 cache does not hold."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressft_kernels.nf4 import NF4

# Rotated inputs take at least this many times the L2 cache, in so many copies at most.
L2_TIMES, COPIES = 2.5, 48


@dataclass(frozen=True)
class Call:
    """What is timed, and what runs before it, untimed."""

    run: Callable[[], object]
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median and the least of the work, the median of issuing it (CUDA).

    On the CPU the median of the quietest third of the rounds, in succession: what else a machine does only slows it.
    """

    ms: float
    least_ms: float
    host_ms: float | None
    samples: int


def clock(device: torch.device) -> Callable[[Call], tuple[float, float | None]]:
    """One call -> (milliseconds, milliseconds on the host or None)."""
    if device.type == "cpu":

        def on_cpu(call: Call) -> tuple[float, float | None]:
            if call.before is not None:
                call.before()
            start = time.perf_counter()
            call.run()
            return 1e3 * (time.perf_counter() - start), None

        return on_cpu

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    behind = 1e-3  # seconds that the device waits, so that all launches of a call are queued before it starts

    def on_cuda(call: Call) -> tuple[float, float | None]:
        nonlocal behind
        if call.before is not None:
            call.before()
        torch.cuda._sleep(int(behind * 2e9))
        begun = time.perf_counter()
        start.record()
        call.run()
        end.record()
        host = time.perf_counter() - begun
        torch.cuda.synchronize()
        behind = min(max(behind, 1.5 * host), 1e-2)
        return start.elapsed_time(end), 1e3 * host

    return on_cuda


def medians(
    works: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, least: int = 9, most: int = 100
) -> dict[str, Times]:
    """Interleaved: each round times every work once, on the next copy of its inputs; for about `seconds` a work."""
    once = clock(device)
    for calls in works.values():
        for call in calls[:2]:
            once(call)
    found: dict[str, list[tuple[float, float | None]]] = {name: [] for name in works}
    names, shuffle = list(works), random.Random(0).shuffle
    end = time.perf_counter() + seconds * len(works)
    for place in range(most):
        if place >= least and time.perf_counter() > end:
            break
        shuffle(names)  # what ran before decides what is in the cache
        for name in names:
            found[name].append(once(works[name][place % len(works[name])]))
    return {name: _median(samples, 3 if device.type == "cpu" else 1) for name, samples in found.items()}


def _median(samples: list[tuple[float, float | None]], parts: int) -> Times:
    host = [h for _, h in samples if h is not None]
    times = [ms for ms, _ in samples]
    size = max(3, -(-len(times) // parts))
    median = min(
        statistics.median(times[place : place + size]) for place in range(0, max(1, len(times) - size + 1), size)
    )
    return Times(median, min(times), statistics.median(host) if host else None, len(samples))


def tensors(value: object) -> list[Tensor]:
    """All tensors in operands, gradients or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, NF4):
        return [value.packed, *value.tables()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def held(value: object) -> int:
    """Bytes of the storages of all tensors in it."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(value)}
    return sum(storages.values())


def copies(operand_bytes: int, device: torch.device) -> int:
    """How many copies of the operands go round, so that a call does not find its own in the cache."""
    if device.type == "cpu":
        return 1  # as in a model's step, where a layer's input has just been written
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(COPIES, int(-(-L2_TIMES * cache // max(operand_bytes, 1)))))


def peak_extra(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call allocates at its peak, besides what it returns; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - held(result))


def saved(run: Callable[[], Tensor], operands: object, elements: int) -> dict[str, int]:
    """What autograd keeps for backward that is neither an operand nor the output.

    Returns:
        bytes, and `weights`: how many of the kept have at least `elements` entries (0: not counted).
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = run()
    known = {t.untyped_storage().data_ptr() for t in [*tensors(operands), output]}
    others = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in known}
    large = [t for t in others.values() if elements and t.numel() >= elements]
    return {"bytes": held(list(others.values())), "weights": len(large)}


def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> dict[str, float]:
    """What the device reaches at best: bytes per second of a copy, FLOP per second of a large product in dtype."""
    cuda = device.type == "cuda"
    size, side = (2**30, 8192) if cuda and not quick else (2**28, 2048) if not quick else (2**24, 512)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Random: on zeros a GPU runs at a higher clock than it can on data.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    works = {"copy": [Call(lambda: target.copy_(source))], "product": [Call(lambda: left @ right)]}
    found = medians(works, device, 0.05 if quick else 0.5)
    return {
        "bytes_per_second": 2 * size / (1e-3 * found["copy"].least_ms),
        "flops_per_second": 2 * side**3 / (1e-3 * found["product"].least_ms),
    }
