"""WebAssembly: npm's `onnxruntime-web` in Node."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.portable.lack import done, installed

# Its releases are not those of the Python package.
VERSION = "1.30.0"
SCRIPT = Path(__file__).with_name("wasm.mjs")


def prepare(folder: Path) -> tuple[tuple[str, ...], str]:
    """The command and the version of what it runs; installed once.

    Raises:
        Lack: Node, npm or the package.
    """
    node, place = installed("node", of="Node.js"), (folder / f"wasm-{VERSION}").resolve()
    install_package(place, "onnxruntime-web", VERSION)
    return (node, str(SCRIPT), str(place)), VERSION


def install_package(place: Path, name: str, version: str) -> None:
    """An npm package in a folder of its own."""
    found = place / "node_modules" / name / "package.json"
    if found.is_file() and json.loads(found.read_text(encoding="utf-8"))["version"] == version:
        return
    npm = installed("npm", of="Node.js")
    place.mkdir(parents=True, exist_ok=True)
    (place / "package.json").write_text("{}", encoding="utf-8")
    # onnxruntime-node's script would fetch CUDA libraries; what runs on a CPU is in the package.
    flags = ["--no-audit", "--no-fund", "--loglevel=error", "--ignore-scripts"]
    command = [npm, "install", *flags, "--prefix", str(place), f"{name}@{version}"]
    done(command, f"npm's {name} {version}")
