"""Build the wheel and the sdist, install the wheel in a clean environment, and run it from outside the source tree.

`pip install -c constraints.txt` of a built file, then `compressft --version`, `env`, `recipes` and a smoke run of the
quickest recipe; the sdist must build the same wheel. What pip pulled is listed next to what the package requires.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.errors import UserError
from compressft.utils.version import __version__

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
RECIPE = "banking77-probe"


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks install`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks install", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "install.json")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="compressft-install-") as scratch:
        found = checked(Path(scratch), console)
    options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps({**found, "installed": len(found["installed"])}, indent=1))
    return 0


def checked(scratch: Path, console: Console) -> dict[str, Any]:
    """Build, install and run; every step that fails ends it with its output.

    Raises:
        UserError: a command failed, or the sdist's wheel has other files.
    """
    tools = environment(scratch / "tools")
    said(tools, "-m", "pip", "install", "-q", "build")
    console.print("building the sdist, and the wheel from it", highlight=False)
    said(tools, "-m", "build", "--outdir", str(scratch / "dist"), str(source(scratch)))
    (wheel,), (sdist,) = (sorted((scratch / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    said(tools, "-m", "build", "--wheel", "--outdir", str(scratch / "direct"), str(scratch / "source"))
    if contents(wheel) != contents(next((scratch / "direct").glob("*.whl"))):
        raise UserError("install: the wheel of the sdist has other files than the wheel of the source")
    python = environment(scratch / "clean")
    console.print("installing the wheel in a clean environment", highlight=False)
    began = time.perf_counter()
    said(python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), f"{wheel}[demo]")
    seconds = time.perf_counter() - began
    outside = scratch / "elsewhere"
    outside.mkdir()
    command = str(python.parent / "compressft")
    if said(command, "--version", folder=outside).split() != ["compressft", __version__]:
        raise UserError("install: the installed command says another version")
    said(command, "env", folder=outside)
    recipes = said(command, "recipes", folder=outside).splitlines()
    console.print(f"a smoke run of {RECIPE}", highlight=False)
    said(command, "run", RECIPE, "--smoke", "--output", "run", folder=outside)
    if not (outside / "run" / "onnx" / "model.onnx").is_file():
        raise UserError("install: the smoke run left no ONNX file")
    listed = json.loads(said(python, "-m", "pip", "list", "--format", "json"))
    return {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks install",
        "wheel": {"name": wheel.name, "bytes": wheel.stat().st_size, "files": len(contents(wheel))},
        "sdist": {"name": sdist.name, "bytes": sdist.stat().st_size},
        "recipes": len(recipes),
        "seconds_to_install": round(seconds, 1),
        "installed": {one["name"]: one["version"] for one in listed},
    }


def source(scratch: Path) -> Path:
    """A copy of what is under version control, so that nothing is built into the source tree."""
    copy, archive = scratch / "source", scratch / "source.tar"
    copy.mkdir()
    said("git", "archive", "--output", str(archive), "HEAD", folder=ROOT)
    said("tar", "xf", str(archive), "-C", str(copy))
    return copy


def environment(folder: Path) -> Path:
    """The python of a new virtual environment."""
    said(sys.executable, "-m", "venv", str(folder))
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def contents(wheel: Path) -> set[str]:
    """Names of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def said(program: str | Path, *arguments: str, folder: Path | None = None) -> str:
    """A command's standard output, in an environment without this checkout.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(program), *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["nothing"]
        raise UserError(f"install: {Path(program).name} {' '.join(arguments)} failed: {last[0]}")
    return done.stdout
