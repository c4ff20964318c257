"""Which path an operation takes on which device, and why: the only place that asks what the hardware is."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

OPERATIONS = ("adapter", "masked_linear", "packed_linear", "block_sparse_linear", "prefix_attention")
# One entry per device or compute capability: what was measured there, else what compiles there without spilling.
TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "table.json").read_text(encoding="utf-8"))


# A table entry to act as if one were on such a device, for compiling and explaining without it.
_pretended: ContextVar[str | None] = ContextVar("compressft_pretended", default=None)


def tf32_allowed() -> bool:
    """Whether float32 products may take tensor cores, by torch's setting of 2.9 and later or by the flag before it.

    Once the setting was used the old flag raises when it is read.
    """
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if setting is None else setting == "tf32"


@contextmanager
def pretending(entry: str) -> Iterator[None]:
    """Inside, choices are made as on a device of this table entry, such as "sm_90".

    Raises:
        ValueError: the table has no such entry.
    """
    if entry not in TABLE:
        raise ValueError(f"dispatch: no entry {entry!r}; there are {', '.join(TABLE)}")
    token = _pretended.set(entry)
    try:
        yield
    finally:
        _pretended.reset(token)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def programs(device: torch.device) -> int:
    """How many blocks a persistent kernel starts on the device: one per multiprocessor."""
    if _pretended.get() is not None:
        return 132
    return _multiprocessors(_index(device)) if device.type == "cuda" else 4


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def table_of(capability: tuple[int, int]) -> str:
    """The table's entry for a compute capability without one of its own, by how much shared memory a block has."""
    if capability >= (9, 0) and capability[0] != 12:
        return "sm_90"
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_89"


def entries(device: torch.device) -> list[str]:
    """The table's entries that hold for a device, the more specific first."""
    pretended = _pretended.get()
    if pretended is not None:
        return [pretended]
    if device.type != "cuda":
        return ["interpreter"]
    index = _index(device)
    return [name for name in (_name(index), table_of(_capability(index))) if name in TABLE]


def configuration(kernel: str, where: list[str], **facts: float | str) -> dict[str, int]:
    """The block sizes, warps and stages of a kernel: of the first entry that knows it, the first row that holds.

    A row holds where each of its conditions does: `name` equals the fact, `name_max` is no less than it.
    """
    for entry in where:
        for row in TABLE[entry].get(kernel, ()):
            if all(_holds(condition, value, facts) for condition, value in row["when"].items()):
                return row["config"]
    raise LookupError(f"no configuration of {kernel} in {where} for {facts}")


def _holds(condition: str, value: float | str, facts: Mapping[str, float | str]) -> bool:
    if condition.endswith("_max"):
        return float(facts[condition.removesuffix("_max")]) <= float(value)
    return facts[condition] == value


def limit(name: str, where: list[str]) -> int | None:
    """A threshold of the first entry that has it; None means never."""
    return next((TABLE[entry]["limits"][name] for entry in where if name in TABLE[entry].get("limits", {})), None)


def interpreted() -> bool:
    """Whether kernels run on the CPU under triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def obstacle(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs on this device in this dtype; None if they do."""
    if _pretended.get() is not None:
        return "float64 has no kernel" if dtype == torch.float64 else None
    if device_type == "cpu" and interpreted() and _triton_installed():
        return "triton's interpreter multiplies bf16 wrongly" if dtype == torch.bfloat16 else None
    if device_type != "cuda":
        return f"there are no kernels for {device_type}"
    if not _triton_installed():
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the kernels are compiled for NVIDIA devices alone"
    if not torch.cuda.is_available():  # fake tensors of a device that is elsewhere
        return "float64 has no kernel" if dtype == torch.float64 else None
    capability = _capability(torch.cuda.current_device() if index is None else index)
    return unsupported(capability, dtype)


# What `torch.compiler.assume_constant_result` does after it has imported torch._dynamo, which takes seconds.
obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(capability: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why the kernels are not for this compute capability in this dtype; None if they are."""
    name = f"compute capability {capability[0]}.{capability[1]}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return f"{name} does not multiply bf16 in hardware; use float16"
    if capability < (8, 0):
        # Compiled for sm_75, tl.dot becomes scalar products that spill; cuBLAS uses that device's tensor cores.
        return f"triton has no tensor-core products for {name}; torch's libraries have"
    return "float64 has no kernel" if dtype == torch.float64 else None


class NotCompiled(RuntimeError):
    """A kernel cannot be compiled for its device; says which and why, in one line."""


# (operation, device) -> why its kernels are not used there any more.
_failures: dict[tuple[str, str], str] = {}


def failure(operation: str, device: torch.device) -> str | None:
    """Why an operation's kernels are not used on the device after one failed to compile there; None if none did."""
    return _failures.get((operation, _place(device))) if _failures else None


def give_up(operation: str, device: torch.device, reason: str) -> None:
    """From now on the operation is plain torch on the device; warns once."""
    if failure(operation, device) is None:
        _failures[operation, _place(device)] = reason
        warnings.warn(f"{operation} is plain torch on {_place(device)} from now on: {reason}", stacklevel=2)


def _place(device: torch.device) -> str:
    return f"{device.type}:{_index(device)}" if device.type == "cuda" else device.type


# One for all threads: gradients are computed in autograd's own.
_kernels_for_float32 = False


@contextmanager
def kernels_for_float32() -> Iterator[None]:
    """Inside, exact float32 takes the kernels wherever there are any: to compare them with torch's libraries."""
    global _kernels_for_float32
    before, _kernels_for_float32 = _kernels_for_float32, True
    try:
        yield
    finally:
        _kernels_for_float32 = before


SCALAR = "exact float32 has no tensor cores: torch's libraries have it until a device shows that the kernel is faster"


def libraries_from(what: str, device_type: str, index: int | None) -> int | None:
    """From how many rows on float32 is left to torch's libraries, if it is exact (`SCALAR` says why); None: nowhere.

    Args:
        what: "adapter", "prefix_attention", or "gradient" of a masked weight or its scores.
    """
    if _kernels_for_float32 or tf32_allowed():
        return None
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    elsewhere = device_type == "cuda" and not torch.cuda.is_available()  # fake tensors
    return limit(f"library_rows_float32_{what}", ["sm_90"] if elsewhere else entries(device))


# As `obstacle`; nor can torch._dynamo trace how the setting of float32 is read.
libraries_from._dynamo_marked_constant = True  # type: ignore[attr-defined]


def left_to_libraries(what: str, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's libraries compute this of x (..., columns) in dtype: see `libraries_from`."""
    if dtype != torch.float32:
        return False
    least = libraries_from(what, x.device.type, x.device.index)
    return least is not None and (least == 0 or math.prod(x.shape[:-1]) >= least)


class Sizes(TypedDict, total=False):
    """What the choice of a path depends on besides: each operation has its own of these."""

    r: int
    columns: int
    nf4: bool
    tile: tuple[int, ...]
    head_dim: int


def misfit(operation: str, sizes: Sizes) -> str | None:
    """Why an operation's kernels do not take these sizes; None if they do."""
    if operation == "adapter" and sizes.get("r", 0) > 256:
        return f"the bottleneck has {sizes.get('r')} units; the kernel keeps at most 256 on chip"
    if operation == "prefix_attention" and sizes.get("head_dim", 0) > 256:
        return f"heads are {sizes.get('head_dim')} wide; the kernel keeps at most 256 on chip"
    if operation == "block_sparse_linear" and not all(b in (16, 32, 64, 128) for b in sizes.get("tile", ())):
        return f"tiles are {sizes.get('tile')}; the kernel takes 16, 32, 64 or 128"
    if operation in ("masked_linear", "packed_linear") and sizes.get("nf4") and sizes.get("columns", 0) % 64:
        return f"{sizes.get('columns')} columns of NF4; the kernel takes multiples of 64"
    return None


def runs_triton(operation: str, x: torch.Tensor, dtype: torch.dtype, **sizes: Unpack[Sizes]) -> bool:
    """Whether the operation takes a Triton kernel for x, computing in dtype; else its plain-torch twin.

    Asked before operands are checked: callers give a size as a sum over a slice of the shape, 0 where there is none.
    """
    if obstacle(x.device.type, x.device.index, dtype) is not None or misfit(operation, sizes) is not None:
        return False
    return failure(operation, x.device) is None and not left_to_libraries(operation, x, dtype)


DEFAULT_SIZES: dict[str, Sizes] = {
    "adapter": {"r": 64},
    "masked_linear": {"columns": 768},
    "packed_linear": {"columns": 768},
    "block_sparse_linear": {"tile": (64, 64)},
    "prefix_attention": {"head_dim": 64},
}


def explain(
    operation: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **sizes: Unpack[Sizes]
) -> str:
    """One line: which path an operation takes on a device in a dtype, and why.

    Args:
        operation: one of `OPERATIONS`.
        device: a torch device, or an entry of the table such as "sm_90" for one that is elsewhere.
        sizes: what the choice depends on besides: r (adapter), columns and nf4 (masked_linear, packed_linear), tile
            (block_sparse_linear), head_dim (prefix_attention); those of BERT-base if not given.

    Raises:
        ValueError: an unknown operation or size, or a CUDA device where there is none.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"explain: operation {operation!r}; there are {', '.join(OPERATIONS)}")
    unknown = set(sizes) - set(DEFAULT_SIZES[operation]) - ({"nf4"} if operation.endswith("ed_linear") else set())
    if unknown:
        raise ValueError(f"explain: {operation} does not depend on {', '.join(sorted(unknown))}")
    entry = str(device) if str(device) in TABLE else None
    where = torch.device("meta" if entry else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"explain: torch sees no CUDA device; name one of {', '.join(e for e in TABLE if 'sm_' in e)}")
    with pretending(entry) if entry else nullcontext():
        reason = obstacle(where.type, where.index, dtype) or misfit(operation, DEFAULT_SIZES[operation] | sizes)
        least = libraries_from(operation, where.type, where.index) if dtype == torch.float32 else None
        reason = reason or failure(operation, where) or (SCALAR if least == 0 else None)
        if reason is not None:
            return f"{operation}: plain torch ({reason})"
        if where.type == "cpu":
            return f"{operation}: Triton kernel, interpreted on the CPU (TRITON_INTERPRET=1)"
        settings = entries(where)[0]
    below = f" below {least} rows" if least else ""
    kind = "compiled for its kind, not measured" if settings.startswith("sm_") else "measured on this device"
    return f"{operation}: Triton kernel{below} (settings of {settings!r}: {kind})"
