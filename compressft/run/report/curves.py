"""Pictures over training steps: loss and its terms, the metric, the compression schedule."""

from typing import TYPE_CHECKING

from compressft.run.report import numbers
from compressft.run.report.summary import part, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: tuple[str, ...] = ("#1d5fa7", "#c2571a", "#2f7d4f", "#8a4fa3", "#967200", "#b83266", "#0f7c8a", "#6b7280")
WIDTH, HEIGHT = 5.2, 3.0  # inches, near the width of a card on the page, so that text keeps its size

Segment = tuple[list[int], list[float]]  # steps and values within one stage


def loss(report: dict, metrics: list[dict]) -> "Figure | None":
    rows = _rows(metrics, "train")
    terms = list(dict.fromkeys(name for row in rows for name in row.get("terms") or {}))
    total = _segments(rows, lambda row: row.get("loss"))
    if not total:
        return None
    figure, axes = _figure()
    if len(terms) > 1:
        for term, colour in zip(terms, _cycle(1), strict=False):
            _lines(axes, _segments(rows, lambda row, term=term: (row.get("terms") or {}).get(term)), term, colour, 1.1)
    _lines(axes, total, "total" if len(terms) > 1 else "loss", COLOURS[0], 1.9)
    axes.set_ylabel("loss")
    if min(value for _, values in total for value in values) >= 0:
        axes.set_ylim(bottom=0)
    _finish(axes, rows)
    return figure


def metric(report: dict, metrics: list[dict]) -> "Figure | None":
    summary = summarise(report)
    rows = _rows(metrics, "eval")
    splits = list(dict.fromkeys(str(row.get("split") or "validation") for row in rows))
    curves = {
        split: _segments(
            [row for row in rows if str(row.get("split") or "validation") == split],
            lambda row: (row.get("metrics") or {}).get(summary.metric),
        )
        for split in splits
    }
    curves = {split: segments for split, segments in curves.items() if segments}
    if not curves:
        return None
    figure, axes = _figure()
    for (split, segments), colour in zip(curves.items(), _cycle(0), strict=False):
        _lines(axes, segments, split, colour, 1.6, marker="o")
    baseline = part(report, "quality").get("baseline")
    if numbers.is_number(baseline):
        axes.axhline(baseline, color="#52606d", linewidth=1.1, linestyle=(0, (4, 3)), zorder=1,
                     label=f"dense baseline, {summary.split}")  # fmt: skip
    axes.set_ylabel(numbers.metric_title(summary.metric))
    percent_axis(axes.yaxis, summary.metric)
    _finish(axes, _rows(metrics, "train") or rows)
    return figure


def schedule(report: dict, metrics: list[dict]) -> "Figure | None":
    rows = [row for row in _rows(metrics, "train") if row.get("status")]
    tracks = list(
        dict.fromkeys(
            (name, quantity)
            for row in rows
            for name, quantities in row["status"].items()
            for quantity, value in (quantities or {}).items()
            if isinstance(value, dict)
        )
    )
    curves = {track: {key: _segments(rows, _reader(*track, key)) for key in ("now", "planned", "target")}
              for track in tracks}  # fmt: skip
    curves = {track: lines for track, lines in curves.items() if lines["now"] or lines["planned"]}
    # A fraction removed and a number of bits share no axis; a number that never moves is not a schedule.
    fractions = {track: lines for track, lines in curves.items() if _values(lines)[-1] <= 1}
    amounts = {track: lines for track, lines in curves.items()
               if track not in fractions and _values(lines)[0] != _values(lines)[-1]}  # fmt: skip
    panels = [panel for panel in (fractions, amounts) if panel]
    if not panels:
        return None
    figure, grid = _figure(len(panels))
    for axes, panel in zip(grid if len(panels) > 1 else [grid], panels, strict=True):
        for (name, quantity), colour in zip(panel, _cycle(0), strict=False):
            lines, label = panel[name, quantity], f"{name} {quantity}"
            _lines(axes, lines["target"], None, colour, 1.1, linestyle=":")
            _lines(axes, lines["now"], label, colour, 2.0)
            _lines(axes, lines["planned"], None, colour, 1.3, linestyle=(0, (4, 3)))
        if panel is fractions:
            axes.set_ylim(-0.02, 1.0)
            axes.set_ylabel("removed")
            percent_axis(axes.yaxis, "accuracy")
        else:
            axes.set_ylim(bottom=0)
            axes.set_ylabel(" / ".join(dict.fromkeys(quantity for _, quantity in panel)))
        _finish(axes, _rows(metrics, "train"), always_legend=True)
    return figure


def percent_axis(axis, metric_name: str | None) -> None:
    """Fractions read as percent, other metrics as they are."""
    if numbers.is_fraction(metric_name):
        from matplotlib.ticker import PercentFormatter

        axis.set_major_formatter(PercentFormatter(1.0))


def _reader(name: str, quantity: str, key: str):
    return lambda row: ((row["status"].get(name) or {}).get(quantity) or {}).get(key)


def _values(lines: dict[str, list[Segment]]) -> list[float]:
    return sorted(value for segments in lines.values() for _, values in segments for value in values)


def _rows(metrics: list[dict], kind: str) -> list[dict]:
    """Rows of one kind by step. A resumed run repeats the steps after its checkpoint: the later row counts."""
    latest = {}
    for row in metrics:
        if row.get("kind") == kind and numbers.is_number(row.get("step")):
            latest[row.get("stage"), row["step"], row.get("split")] = row
    return sorted(latest.values(), key=lambda row: row["step"])


def _segments(rows: list[dict], read) -> list[Segment]:
    """One line per stage, because stages have different objectives and must not be joined."""
    stages: dict[object, Segment] = {}
    for row in rows:
        value = read(row)
        if numbers.is_number(value):
            steps, values = stages.setdefault(row.get("stage"), ([], []))
            steps.append(row["step"])
            values.append(value)
    return list(stages.values())


def _lines(axes: "Axes", segments: list[Segment], label: str | None, colour: str, width: float, **style) -> None:
    for index, (steps, values) in enumerate(segments):
        marker = style.get("marker") or ("o" if len(steps) == 1 else None)
        axes.plot(steps, values, color=colour, linewidth=width, label=None if index else label,
                  **{**style, "marker": marker, "markersize": 3.5})  # fmt: skip


def _finish(axes: "Axes", rows: list[dict], always_legend: bool = False) -> None:
    axes.grid(axis="y")
    axes.set_xlabel("step")
    _stage_boundaries(axes, rows)
    handles, _ = axes.get_legend_handles_labels()
    if always_legend or len(handles) > 1:
        # Below the plot, where it can hide no line.
        axes.figure.legend(
            handles=handles, loc="outside lower left", ncols=min(4, len(handles)), columnspacing=1.2, handlelength=1.6
        )


def _stage_boundaries(axes: "Axes", rows: list[dict]) -> None:
    spans: dict[str, list[int]] = {}
    for row in rows:
        spans.setdefault(str(row.get("stage") or ""), []).append(row["step"])
    if len(spans) < 2:
        return
    end = max(row["step"] for row in rows)
    start = 0
    axes.set_xlim(0, end * 1.01)
    for index, (name, steps) in enumerate(spans.items()):
        if index:
            axes.axvline(start, color="#9aa5b1", linewidth=1)
        room = int((max(steps) - start) / end * WIDTH * 9)  # characters that fit above this stage
        if room >= 4:
            text = name if len(name) <= room else name[: room - 1] + "…"
            axes.text(start, 1.02, f" {text}", transform=axes.get_xaxis_transform(), fontsize=8.5, color="#3e4c59")
        start = max(steps)


def _cycle(first: int) -> list[str]:
    return [*COLOURS[first:]] * 8


def _figure(panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT * (1 + 0.6 * (panels - 1))), layout="constrained")
    return figure, figure.subplots(panels, 1)
