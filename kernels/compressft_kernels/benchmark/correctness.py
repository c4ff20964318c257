"""Is an operator as exact as PyTorch? FlashAttention's rule, for the output and every gradient.

error <= 2 * PyTorch's error + eps * largest value, both against the float64 twin on the same rounded operands.
PyTorch's error is that of the eager composition in the same dtype, or of its fused function if that is less exact. The
last term is one rounding of the largest result (FlashAttention takes it of values around 0.3): of two results that are
both rounded correctly neither is wrong where the other happens to be exact. Where the truth is 0 everywhere it is 0.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from compressft_kernels import dispatch
from compressft_kernels.benchmark.cases import Case, Operands, upcast

FACTOR = 2.0
Row = dict[str, Any]


def results(
    call: Callable[[Operands], Tensor], operands: Operands, leaves: Iterable[str], seed: int = 1
) -> dict[str, Tensor]:
    """{"y": output, leaf: its gradient, ...}; dy is random, the same for any dtype."""
    o = operands | {name: operands[name].detach().requires_grad_() for name in leaves}
    y = call(o)
    generator = torch.Generator(y.device).manual_seed(seed)
    # Drawn in float32 and rounded to bf16: every dtype holds these values exactly but float16 its smallest.
    dy = torch.randn(y.shape, generator=generator, device=y.device).to(torch.bfloat16).to(y.dtype)
    gradients = torch.autograd.grad(y, [o[name] for name in leaves], dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def verdict(got: Tensor, peers: Sequence[Tensor], truth: Tensor, dtype: torch.dtype) -> Row:
    """Both errors, what is allowed, and whether `got` is right."""
    if got.shape != truth.shape or got.dtype != dtype:
        found = f"{tuple(got.shape)} {got.dtype}, not {tuple(truth.shape)} {dtype}"
        return {"error": None, "torch_error": None, "allowed": None, "right": False, "reason": found}
    error = _largest(got.double() - truth)
    of_torch = max(_largest(peer.double() - truth) for peer in peers)
    allowed = FACTOR * of_torch + torch.finfo(dtype).eps * _largest(truth)
    # Comparing with NaN is false, on either side.
    return {"error": error, "torch_error": of_torch, "allowed": allowed, "right": error <= allowed}


def check(case: Case, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """A row for the output and each gradient; one row that says why, if it raised."""
    about = {"operation": case.operation, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
    try:
        operands = case.make(device, dtype, 0)
        truth = results(case.truth, upcast(operands), case.leaves)
        torchs = [case.naive, *([case.library] if case.library else [])]
        peers = [results(call, operands, case.leaves) for call in torchs]
        with dispatch.kernels_for_float32():
            got = results(case.ours, operands, case.leaves)
        failure = dispatch.failure(case.operation, device)
        if failure is not None:
            return [about | {"of": "all", "right": False, "reason": failure}]
        return [
            about | {"of": name} | verdict(got[name], [peer[name] for peer in peers], truth[name], dtype)
            for name in truth
        ]
    except Exception as error:
        return [about | {"of": "all", "right": False, "reason": brief(error)}]


def brief(error: BaseException) -> str:
    """An exception as one line of at most 160 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def suite(cases: Iterable[Case], device: torch.device, dtypes: Iterable[torch.dtype]) -> list[Row]:
    """All rows of all cases in all dtypes."""
    return [row for dtype in dtypes for case in cases for row in check(case, device, dtype)]


def _start(table: Mapping[str, object]) -> None:
    dispatch.TABLE.update(table)


def _check_one(place: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    from compressft_kernels.benchmark import shapes

    return check(shapes.checks()[place], device, dtype)


def suite_in_processes(
    cases: Sequence[Case | None], device: torch.device, dtypes: Iterable[torch.dtype], workers: int
) -> list[Row]:
    """The same for `shapes.checks()`, of which `cases` has those that are wanted (None for the others).

    On a GPU nearly all of the time goes into compiling each kernel for each dtype, which processes do at a time; and a
    kernel that reads out of bounds ends the process that it ran in, not the benchmark.
    """
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with ProcessPoolExecutor(workers, spawn, initializer=_start, initargs=(dispatch.TABLE,)) as pool:
        jobs = [
            (case, dtype, pool.submit(_check_one, place, device, dtype))
            for dtype in dtypes
            for place, case in enumerate(cases)
            if case is not None
        ]
        for case, dtype, job in jobs:
            try:
                rows += job.result()
            except Exception as error:  # the process is gone
                about = {"operation": case.operation, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
                rows.append(about | {"of": "all", "right": False, "reason": brief(error)})
    return rows


def red(rows: Iterable[Row]) -> dict[str, str]:
    """operation -> why it is wrong; right ones are left out."""
    reasons: dict[str, str] = {}
    for row in rows:
        if not row["right"] and row["operation"] not in reasons:
            why = row.get("reason") or f"error {row['error']:.3g}, allowed {row['allowed']:.3g}"
            reasons[row["operation"]] = f"{row['of']} of {row['case']} in {row['dtype']}: {why}"
    return reasons


def differs(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> str | None:
    """Why results at a timed shape are not those of PyTorch in the same dtype; None if they are.

    Coarse, as there is no float64 truth at these sizes: the norm of the difference against that of the result.
    """
    for name, tensor in got.items():
        other = want[name].float()
        off, norm = (tensor.float() - other).norm().item(), other.norm().item()
        if not off <= min(64 * torch.finfo(tensor.dtype).eps, 0.05) * norm:
            return f"{name} at this size: off by {off:.3g}, of {norm:.3g}"
    return None
