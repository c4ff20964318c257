"""Writes the report folder: all is rendered first, then each file is put in place atomically, report.json last."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressft.run.report.markdown import render_markdown
from compressft.utils.phases import phase
from compressft.utils.visible import all_visible


@phase("report")
def write_report(
    report: dict, metrics: list[dict], folder: str | Path, seconds: Callable[[], dict] | None = None
) -> dict:
    """Write report.json, report.md, report.html and the PNGs of one run into `folder`, which is created if need be.

    Returns the report as it was written; `seconds` gives its key of this name once the pictures, which take the longest
    of all this, are drawn.

    `report` has the keys of the report.json contract; `metrics` are the rows of metrics.jsonl (see `load_metrics`).
    NaN and infinities, which JSON has no form for, are recorded as null together with a line in "notes".
    """
    # Imported here because matplotlib and jinja2 are slow to import and only this function needs them.
    from compressft.run.report.figures import FIGURE_NAMES, draw
    from compressft.run.report.html import render_html

    report = _finite_report(report)
    pictures = draw(all_visible(report), all_visible(metrics))
    if seconds is not None:
        report |= {"seconds": seconds()}
    shown = all_visible(report)
    files = {f"{picture.name}.png": picture.png for picture in pictures}
    files["report.html"] = render_html(shown, pictures).encode()
    files["report.md"] = render_markdown(shown).encode()
    # Last, so that a folder with a report.json is a complete one.
    files["report.json"] = (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        _replace(folder / name, content)
    for name in FIGURE_NAMES:  # a picture left by an earlier report of this run would contradict this one
        if f"{name}.png" not in files:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return report


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite_report(report: dict) -> dict:
    lost: list[str] = []
    clean = _finite(report, "", lost)
    if lost:
        clean["notes"] = [*(clean.get("notes") or []), *lost]
    return clean


def _finite(value: Any, where: str, lost: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item, f"{where}.{key}".lstrip("."), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{where}[{index}]", lost) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{where} came out as {value}; it is recorded as null.")
        return None
    return value
