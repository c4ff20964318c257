"""The machines: how a script runs on each, and what one lacks, in a line."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import onnxruntime

from benchmarks.portable import arm64, wasm
from benchmarks.portable.lack import Lack, installed
from compressft.errors import UserError, nearest

HERE = Path(__file__).parent
SCORE = HERE / "score.py"
# Of x86 processors: those that decide which int8 and bf16 kernels run.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
EXACT = {"session.x64quantprecision": "1"}


@dataclass(frozen=True)
class Ready:
    """A machine that is there: `command` takes JOB.json and ANSWER.json; `version` is its onnxruntime's."""

    command: tuple[str, ...]
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """`prepare` gets what it needs into a folder, once, and raises `Lack`; `options` are the session's.

    `key` tells machines of one name apart, `threads` 0 takes onnxruntime's own number.
    """

    name: str
    shows: str
    prepare: Callable[[Path], Ready]
    options: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    threads: int = 1

    @property
    def title(self) -> str:
        """Its name in the results."""
        return f"{self.name}: {self.key}" if self.key else self.name


@dataclass(frozen=True)
class Processor:
    """This machine's: its name, and the flags of FLAGS that it has."""

    name: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}; {', '.join(self.flags) or 'none of ' + ', '.join(FLAGS)}"


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """As Linux describes it; elsewhere a name alone."""
    found = {}
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    has = found.get("flags", "").split()
    return Processor(name, tuple(flag for flag in FLAGS if flag in has))


def _here(folder: Path) -> Ready:
    return Ready((sys.executable, str(SCORE)), onnxruntime.__version__)


def _exact(folder: Path) -> Ready:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise Lack(f"an x86-64 machine (this is {platform.machine()})")
    return _here(folder)


def _emulated(model: str) -> Callable[[Path], Ready]:
    """This interpreter and its packages on another x86-64 processor."""

    def prepare(folder: Path) -> Ready:
        if platform.machine() != "x86_64":
            raise Lack(f"an x86-64 machine to emulate an older one on (this is {platform.machine()})")
        emulator = installed("qemu-x86_64-static", "qemu-x86_64", of="qemu-user-static")
        # A wrapper script would start the interpreter natively; packages are found whatever it takes for its prefix.
        places = {str(Path(module.__file__ or "").parents[1]) for module in (numpy, onnxruntime)}
        command = (emulator, "-cpu", model, str(Path(sys.executable).resolve()), str(SCORE))
        return Ready(command, onnxruntime.__version__, {"PYTHONPATH": ":".join(sorted(places))})

    return prepare


def _arm64(model: str) -> Callable[[Path], Ready]:
    def prepare(folder: Path) -> Ready:
        place = arm64.prepare(folder)
        return Ready((*place.command(model), str(SCORE)), place.version, place.environment())

    return prepare


def _wasm(folder: Path) -> Ready:
    command, version = wasm.prepare(folder)
    return Ready(command, version)


def machines() -> tuple[Machine, ...]:
    """All of them, in the table's order."""
    own = str(processor())
    return (
        Machine("here", "this machine, a session as a user opens it", _here, key=own, threads=0),
        Machine("here-exact", "this machine, session option x64quantprecision", _exact, EXACT, own, 0),
        Machine("haswell", "x86-64 with AVX2, no VNNI (emulated Haswell)", _emulated("Haswell")),
        Machine("nehalem", "x86-64 with SSE4.2 (emulated Nehalem)", _emulated("Nehalem")),
        Machine("wasm", "WebAssembly SIMD (onnxruntime-web in Node)", _wasm),
        # The kernel that each of them takes was read from the emulated code: umlal, udot, ummla, SVE's ummla. SME is
        # left out: qemu 7.2 computes its smopa wrongly, a single instruction by itself.
        Machine("a72", "arm64 without dot products (emulated Cortex-A72)", _arm64("cortex-a72")),
        Machine("arm64-dot", "arm64 with dot products (emulated Neoverse N1)", _arm64("neoverse-n1")),
        Machine("arm64-i8mm", "arm64 with i8mm, without SVE (emulated)", _arm64("max,sve=off,sme=off")),
        Machine("arm64-max", "arm64 with i8mm, bf16 and SVE (emulated)", _arm64("max,sme=off")),
    )


def picked(names: Sequence[str] | None) -> tuple[Machine, ...]:
    """The machines of these names; all where there are none.

    Raises:
        UserError: there is no machine of that name.
    """
    known = {machine.name: machine for machine in machines()}
    for name in names or ():
        if name not in known:
            raise UserError(f"--machine {name}: no such machine; known: {', '.join(known)}{nearest(name, known)}")
    return tuple(known[name] for name in names) if names else tuple(known.values())
