"""The final table on the terminal; fits 80 columns."""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compressft.run.report import numbers
from compressft.run.report.summary import Summary, part, portable_sentence, summarise, target_lines, time_rows

# So many phases are named, the longest ones.
MOST_PHASES = 3


def terminal_table(report: dict) -> RenderableType:
    """A rich renderable with quality, size, parameters, latency, parity and training time of one report."""
    summary = summarise(report)
    title = Text(" \N{MIDDLE DOT} ".join(str(report[key]) for key in ("name", "model", "task") if report.get(key)))
    title.no_wrap, title.overflow = True, "ellipsis"
    title.stylize("bold")
    return Group(title, _before_after(report, summary), _latency(summary), *_lines(report))


def _before_after(report: dict, summary: Summary) -> Table:
    quality, sizes, parameters = (part(report, key) for key in ("quality", "size_bytes", "parameters"))
    metric = summary.metric
    table = _table("", "base", "compressed", "change")
    for place, key, difference in (
        ("torch", "torch", summary.torch_difference),
        ("ONNX", "onnx", summary.onnx_difference),
    ):
        table.add_row(
            _cell(f"{numbers.metric_title(metric)}, {summary.split}, {place}"),
            _cell(numbers.score(metric, quality.get("baseline"))),
            _cell(numbers.score(metric, quality.get(key))),
            _cell(numbers.score_difference(metric, difference)),
        )
    for label, write, before, after, change in (
        ("ONNX file", numbers.size, sizes.get("base_onnx"), sizes.get("onnx"), summary.size_change),
        ("parameters", numbers.count, parameters.get("base"), parameters.get("total"), summary.parameter_change),
    ):
        table.add_row(_cell(label), _cell(write(before)), _cell(write(after)), _cell(numbers.change(change)))
    return table


def _latency(summary: Summary) -> RenderableType:
    if not summary.latencies:
        return Text(f" latency: {numbers.MISSING}")
    table = _table("latency, p50", "torch base", "ONNX base", "compressed", "vs ONNX", "vs torch")
    for row in summary.latencies:
        times = (numbers.milliseconds(value) for value in (row.torch, row.base, row.compressed))
        ratios = (numbers.ratio(value) for value in (row.speed_up, row.speed_up_torch))
        table.add_row(_cell(row.label), *(_cell(text) for text in (*times, *ratios)))
    return table


def _lines(report: dict) -> list[Padding]:
    parity, training = part(report, "parity"), part(report, "training")
    agreement = parity.get("label_agreement")
    lines = [f"parity: largest output difference torch to ONNX {numbers.error(parity.get('max_abs_error'))}"]
    if agreement is not None:
        lines.append(f"parity: same label for {numbers.percent(agreement)} of {parity.get('split') or 'test'} rows")
    if portable_sentence(report):
        lines.append("portable: the same integer sums on every processor")
    lines += [f"target: {line}" for line in target_lines(report)]
    lines.append(f"training: {numbers.duration(training.get('seconds'))}")
    if training.get("examples_per_second") is not None:
        lines[-1] += ", " + numbers.rate(training["examples_per_second"], "examples")
    if report.get("peak_memory_bytes") is not None:
        lines.append(f"memory: at most {numbers.size(report['peak_memory_bytes'])} in the whole run")
    if rows := time_rows(report):
        *phases, (_, total, _) = rows
        most = sorted(phases, key=lambda row: -row[1])[:MOST_PHASES]
        said = ", ".join(f"{name} {numbers.duration(value)}" for name, value, _ in most)
        lines.append(f"time: {numbers.duration(total)}, of it {said}")
    lines += [f"{found['type']}: {found['sentence']}" for found in report.get("analyses") or ()]
    lines += [f"note: {note}" for note in report.get("notes") or ()]
    return [Padding(Text(line), (0, 0, 0, 1), expand=False) for line in lines]


def analysis_table(found: dict) -> RenderableType:
    """One analysis as it stands in report.json: its table, whole, and what it found."""
    first, *others = found["columns"]
    table = _table(first, *others)
    for row in found["rows"]:
        table.add_row(*(_cell(numbers.cell(value)) for value in row))
    lines = [found["sentence"], *(f"note: {note}" for note in found["notes"])]
    return Group(Text(found["title"], style="bold"), table, *(Text(line) for line in lines))


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=True)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _cell(text: str) -> Text:
    # Text, not str: rich would read "[bold]" in a name as markup.
    return Text(text, style="dim") if text == numbers.MISSING else Text(text)
