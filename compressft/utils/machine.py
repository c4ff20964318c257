"""The machine and this process: cores, memory, versions."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compressft.utils.version import __version__

PACKAGES = (
    "compressft",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "onnx",
    "onnxscript",
    "onnxruntime",
)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Threads of a runtime that is not told how many: what OMP_NUM_THREADS asks for, else all usable cores."""
    # A list says how many in regions inside others.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cores()


def peak_memory() -> int:
    """Peak bytes of this process so far: allocated on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import psutil

    info = psutil.Process().memory_info()
    try:
        import resource

        # macOS counts bytes, others kibibytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return getattr(info, "peak_wset", info.rss)


def process_age() -> float:
    """Seconds since this process was started."""
    import psutil

    return max(time.time() - psutil.Process().create_time(), 0.0)


def hardware() -> dict[str, Any]:
    """CPU, cores, memory, and the GPU where there is one."""
    import psutil
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    found = {"cpu": name, "cores": usable_cores(), "memory_bytes": psutil.virtual_memory().total}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of this package, Python and the packages that matter; those not installed are left out."""
    found = {"compressft": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
