"""Run the shipped edge recipes and record what their files weigh, cost and score.

Each recipe's run directory lies under `runs/benchmarks/` by recipe hash: an interrupted benchmark resumes, a finished
run is only measured again (`--again`) or read.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from compressft.recipe.recipe import load_recipe
from compressft.run.again import export_again
from compressft.run.flow import run

RECIPES = ("banking77-edge", "banking77-edge-full", "banking77-tiny")
RESULTS = Path(__file__).parent / "results"
KEYS = (
    "quality",
    "parity",
    "verification",
    "size_bytes",
    "parameters",
    "latency_ms",
    "training",
    "shapes",
    "stages",
    "versions",
    "hardware",
    "recipe_hash",
)


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks edge`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks edge", description=__doc__)
    parser.add_argument(
        "recipes", nargs="*", default=RECIPES, help="recipes to run (default: the shipped edge recipes)"
    )
    parser.add_argument("--again", action="store_true", help="export and measure finished runs again")
    parser.add_argument("--json", type=Path, default=RESULTS / "edge.json")
    options = parser.parse_args(arguments)
    reports = {name: report(name, options.again) for name in options.recipes}
    document = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks edge",
        "recipes": {name: {key: r[key] for key in KEYS} for name, r in reports.items()},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    options.json.with_suffix(".md").write_text(table(document), encoding="utf-8")
    print(table(document))
    return 0


def report(name: str, again: bool) -> dict[str, Any]:
    """A recipe's report, from its finished run where there is one."""
    recipe = load_recipe(name)
    folder = Path("runs") / "benchmarks" / f"{name}-{recipe.hash[7:19]}"
    written = folder / "report" / "report.json"
    if not written.is_file():
        return run(recipe, folder, resume=(folder / "recipe.yaml").is_file(), console=Console(stderr=True))
    return export_again(folder, ()) if again else json.loads(written.read_text(encoding="utf-8"))


def table(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"# Edge recipes ({document['date']})",
        "",
        f"`{document['command']}`",
        "",
        "| recipe | accuracy: dense fp32 / torch / int8 ONNX | label agreement | ONNX file, share of fp32 base "
        "| 1x32 | 1x128 | 8x128 | training |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, r in document["recipes"].items():
        q, size = r["quality"], r["size_bytes"]
        accuracy = " / ".join(f"{100 * q[k]:.2f} %" for k in ("baseline", "torch", "onnx"))
        share = f"{size['onnx'] / 1e6:.2f} MB, {100 * size['onnx'] / size['base_onnx']:.1f} %"
        speed = " | ".join(latency(r["latency_ms"], *shape) for shape in ((1, 32), (1, 128), (8, 128)))
        agreement = f"{100 * r['parity']['label_agreement']:.2f} %"
        lines.append(f"| {name} | {accuracy} | {agreement} | {share} | {speed} | {r['training']['seconds']:.0f} s |")
    any_report = next(iter(document["recipes"].values()))
    hardware, versions = any_report["hardware"], any_report["versions"]
    lines += [
        "",
        "Latency: p50 of the int8 file, and how many times faster than the fp32 ONNX of the dense model, both in "
        "onnxruntime, each in a process of its own, interleaved, of each the quietest round.",
        "",
        f"{hardware['cpu']}, {hardware['cores']} cores; " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
    ]
    return "\n".join(lines)


def latency(rows: list[dict[str, Any]], batch: int, length: int) -> str:
    """p50 of the compressed file and its ratio to the base's."""
    p50 = {
        r["model"]: r["p50"] for r in rows if (r["runtime"], r["batch"], r["length"]) == ("onnxruntime", batch, length)
    }
    return f"{p50['compressed']:.2f} ms ({p50['base_fp32'] / p50['compressed']:.1f}x)"
