"""Second environments: packages that want an older transformers than ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = ROOT / "runs" / "benchmarks"
PEERS = ("transformers==4.57.6", "adapters==1.3.0")
# As we have them ourselves (constraints.txt), so that a difference is not torch's.
SHARED = ("torch", "safetensors", "numpy")


def requirements(peers: Sequence[str] = PEERS, shared: Sequence[str] = SHARED) -> list[str]:
    """What is installed there."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [*peers, *(line for line in lines if line.partition("==")[0] in shared)]


def environment() -> Path:
    """The python of the `adapters` package's, installed once for these versions.

    Raises:
        subprocess.CalledProcessError: the packages cannot be installed; pip has said why.
    """
    return install("adapters", PEERS, SHARED)


def install(name: str, peers: Sequence[str], shared: Sequence[str]) -> Path:
    """The python of an environment with `peers`, and with our versions of `shared`; as `environment`."""
    wanted = requirements(peers, shared)
    digest = hashlib.sha256("\n".join([*wanted, sys.version]).encode()).hexdigest()[:12]
    folder = HOME / f"{name}-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / ".installed"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing {', '.join(wanted)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        subprocess.run(command, check=True)
        done.touch()
    return python
