"""Pictures of before and after: size, latency, shapes of the layers, quality against latency."""

from typing import TYPE_CHECKING

from compressft.run.report import numbers
from compressft.run.report.curves import HEIGHT, WIDTH, percent_axis
from compressft.run.report.summary import layers, part, shape_parts, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPRESSED, BASE, TORCH = "#1d5fa7", "#a9b4c0", "#c98a3c"
_PALE = "#d5dde6"


def size(report: dict, metrics: list[dict]) -> "Figure | None":
    sizes = part(report, "size_bytes")
    entries = [
        ("base, ONNX", "base_onnx", BASE),
        ("compressed, ONNX", "onnx", COMPRESSED),
        ("compressed, safetensors", "model", "#6f9bd0"),
        ("delta", "delta", "#6f9bd0"),
    ]
    found = [(label, sizes[key], colour) for label, key, colour in entries if numbers.is_number(sizes.get(key))]
    if len(found) < 2:  # nothing to compare
        return None
    figure, axes = _figure(0.3 + 0.34 * len(found))
    _bars(axes, found, numbers.size)
    return figure


def latency(report: dict, metrics: list[dict]) -> "Figure | None":
    panels = []
    for row in summarise(report).latencies:
        entries = [("torch base", row.torch, TORCH), ("ONNX base", row.base, BASE),
                   ("compressed", row.compressed, COMPRESSED)]  # fmt: skip
        found = [entry for entry in entries if entry[1] is not None]
        if found:
            panels.append((row, found))
    if not panels:
        return None
    figure, grid = _figure(sum(0.45 + 0.25 * len(found) for _, found in panels), len(panels))
    for axes, (row, found) in zip(grid if len(panels) > 1 else [grid], panels, strict=True):
        _bars(axes, found, numbers.milliseconds)
        title = f"batch{numbers.TIMES}length {row.label}"
        if row.speed_up is not None:
            title += f": {numbers.ratio(row.speed_up)} the speed of ONNX base"
        axes.set_title(title, fontsize=9.5)
    return figure


def shapes(report: dict, metrics: list[dict]) -> "Figure | None":
    base, kept = layers(report)
    parts = shape_parts(report)
    # With layers removed the two lists cannot be laid side by side; the table in the report still shows both.
    if not parts or not base or len(base) != len(kept):
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(2.1 * WIDTH, 2.3), layout="constrained")  # across both columns of the page
    grid = figure.subplots(1, len(parts))
    places = range(len(base))
    for axes, name in zip(grid if len(parts) > 1 else [grid], parts, strict=True):
        before, after = ([_count(layer.get(name)) for layer in side] for side in (base, kept))
        axes.bar(places, before, color=_PALE, width=0.74)
        drawn = axes.bar(places, after, color=COMPRESSED, width=0.74)
        if len(base) <= 16:
            axes.bar_label(drawn, [f"{value:g}" for value in after], fontsize=8, padding=1.5, color="#1f2933")
        axes.set_title({"ffn": "FFN neurons", "heads": "attention heads"}.get(name, name.replace("_", " ")))
        axes.set_xticks([place for place in places if place % (1 + len(base) // 13) == 0])
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, max([*before, *after, 1]) * 1.12)
        axes.set_xlim(-0.6, len(base) - 0.4)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.grid(axis="y")
        axes.set_xlabel("layer")
    return figure


def tradeoff(report: dict, metrics: list[dict]) -> "Figure | None":
    summary, quality = summarise(report), part(report, "quality")
    row = summary.headline
    if row is None:
        return None
    # Labels of the higher point go above it and of the lower one below it, so that none covers the other point.
    gain = (summary.onnx_difference or 0) * (-1 if numbers.lower_is_better(summary.metric) else 1)
    side = 1 if gain > 0 else -1
    entries = [
        ("compressed, ONNX", row.compressed, quality.get("onnx"), COMPRESSED, "o", side),
        ("base, ONNX", row.base, quality.get("baseline"), "#68737f", "s", -side),
        ("base, torch eager", row.torch, quality.get("baseline"), TORCH, "D", side),
    ]
    found = [
        (label, x, y, colour, marker, side)
        for label, x, y, colour, marker, side in entries
        if numbers.is_number(x) and numbers.is_number(y)
    ]
    if not found or not numbers.is_number(quality.get("onnx")):
        return None
    figure, axes = _figure(HEIGHT)
    right = max(entry[1] for entry in found) * 1.15
    for label, x, y, colour, marker, side in found:
        axes.plot([x], [y], marker=marker, color=colour, markersize=9, linestyle="none", clip_on=False)
        text = f"{label}\n{numbers.score(summary.metric, y)}, {numbers.milliseconds(x)}"
        place = "left" if x < right * 0.3 else "right" if x > right * 0.7 else "center"
        axes.annotate(text, (x, y), (0, side * 10), textcoords="offset points", ha=place,
                      va="bottom" if side > 0 else "top", fontsize=8.5)  # fmt: skip
    values = [entry[2] for entry in found]
    # Room for the labels, and never a range so narrow that a tenth of a point looks like a cliff.
    least = 0.01 if numbers.is_fraction(summary.metric) else 0.02 * max(abs(value) for value in values)
    margin = max((max(values) - min(values)) * 0.8, least)
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xlim(0, right)
    if numbers.lower_is_better(summary.metric):
        axes.invert_yaxis()  # the picture keeps one reading: up and to the left is better
    percent_axis(axes.yaxis, summary.metric)
    axes.set_ylabel(f"{numbers.metric_title(summary.metric)}, {summary.split}")
    axes.set_xlabel(f"latency in ms, p50, batch{numbers.TIMES}length {row.label}")
    axes.grid(True)
    return figure


def _bars(axes: "Axes", entries: list[tuple], write) -> None:
    labels, values, colours = zip(*entries, strict=True)
    places = range(len(entries), 0, -1)
    drawn = axes.barh(places, values, color=colours, height=0.66)
    axes.bar_label(drawn, [write(value) for value in values], padding=4, fontsize=8.5, color="#1f2933")
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, (max(values) or 1) * 1.16)


def _count(value: object) -> float:
    return value if numbers.is_number(value) else 0


def _figure(height: float, panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(panels, 1)
