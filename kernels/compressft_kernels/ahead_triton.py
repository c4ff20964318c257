"""Compile kernels for a GPU that is not there, and read from the machine code what it would do."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from compressft_kernels.disassembly import COPY, Loop, count, inner_loops, read
from compressft_kernels.launch_triton import intercepting

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes of shared memory that one block may use, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024
}  # fmt: skip


class _Absent(DriverBase):
    """A driver that knows its target and nothing else."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:  # type: ignore[override]
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:  # type: ignore[override]
        return self.target

    def get_active_torch_device(self) -> NoReturn:
        raise NotImplementedError

    def get_benchmarker(self) -> NoReturn:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return int(self.target.arch)  # a cache of its own per target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(capability: int) -> Iterator[None]:
    """Inside, triton compiles for this compute capability (90 for sm_90)."""
    before = driver._active
    driver.set_active(_Absent(capability))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Inside, launches compile for this compute capability and do not run; gives (name, compiled) per launch."""
    compiled: list[tuple[str, CompiledKernel]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], args: tuple[object, ...], options: dict[str, object]) -> None:
        compiled.append((kernel.fn.__name__, kernel.warmup(*args, grid=grid, **options)))

    with target(capability), intercepting(compile_only):
        yield compiled


@dataclass(frozen=True)
class Facts:
    """What a compiled kernel needs and does. Bytes; instructions are counted in the disassembly."""

    registers: int
    stack: int
    local: int  # LDL and STL: spills
    hgmma: int  # warpgroup products (sm_90)
    utcmma: int  # products in tensor memory (sm_100)
    hmma: int  # warp products
    shared: int
    wide_loads: int  # 16-byte copies from global to shared memory, or by the bulk copy engine
    narrow_loads: int  # smaller copies from global to shared memory
    overwritten: int  # shared operands of products in flight with fewer buffers than stages
    loops: tuple[Loop, ...]

    def faults(self, capability: int) -> list[str]:
        """Why this must not be shipped; empty if it may."""
        found = []
        if self.stack or self.local:
            found.append(f"{self.stack} B of stack and {self.local} local loads and stores: it spills")
        if self.overwritten:
            found.append(f"{self.overwritten} operands are refilled while a product still reads them")
        if self.shared > SHARED_LIMIT[capability]:
            found.append(f"{self.shared} B of shared memory; sm_{capability} has {SHARED_LIMIT[capability]}")
        return found


def facts(compiled: CompiledKernel) -> Facts:
    """Read the cubin of what triton compiled with the cuobjdump it brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "--dump-sass")
        )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None, usage

    instructions = read(code)
    wide = count(instructions, r"LDGSTS(?:\.\w+)*\.128") + count(instructions, r"UTMALDG")
    return Facts(
        registers=int(used[1]),
        stack=int(used[2]),
        local=count(instructions, r"LDL|STL"),
        hgmma=count(instructions, r"HGMMA"),
        utcmma=count(instructions, r"UTC\w*MMA"),
        hmma=count(instructions, r"HMMA"),
        shared=compiled.metadata.shared,
        wide_loads=wide,
        narrow_loads=count(instructions, COPY) - wide,
        overwritten=_overwritten(compiled.asm["ttgir"], compiled.metadata.num_stages),
        loops=inner_loops(instructions),
    )


def _overwritten(ttgir: str, stages: int) -> int:
    """Operands of warpgroup products that a loop leaves in flight, in fewer buffers than there are stages.

    Triton (3.6, 3.7) gives a tile that is loaded for a product and also used in registers one buffer too few.
    """
    found = 0
    for loop in re.finditer(r"= scf\.for .*?\n(.*?)\n +scf\.yield", ttgir, re.DOTALL):
        body = loop[1]
        if not re.search(r"pendings = [1-9]", body):
            continue
        whole = dict(re.findall(r"(%\S+) = ttg\.memdesc_index (%\S+?)\[", body))
        turned = dict(re.findall(r"(%\S+) = ttg\.memdesc_trans (%\S+) ", body))
        for operands in re.findall(r"warp_group_dot (%\S+), (%\S+), .*isAsync", body):
            for operand in (turned.get(o, o) for o in operands):
                if operand in whole:
                    allocation = re.escape(whole[operand]) + r" = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x"
                    buffers = re.search(allocation, ttgir)
                    found += buffers is not None and int(buffers[1]) < stages
    return found
