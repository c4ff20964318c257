"""report.md: the report as text, fit for the body of a model card (no picture links, so that it can be moved)."""

from compressft.run.report import numbers
from compressft.run.report.summary import (
    Summary,
    analysis_tables,
    layer_rows,
    part,
    portable_sentence,
    sentence,
    summarise,
    target_lines,
    time_rows,
)

# What the first output means, per task; anything else gets the neutral line.
_READING = {
    "sequence-classification": "print(logits.argmax(-1))  # one class index per text; names: id2label in config.json",
    "token-classification": "print(logits.argmax(-1))  # one class index per token; names: id2label in config.json",
    "regression": "print(logits.squeeze(-1))  # one value per text",
}


def render_markdown(report: dict, usage: str | None = None) -> str:
    """The report as Markdown; `usage` says how the model is loaded (default: its ONNX file, from the run directory)."""
    summary = summarise(report)
    sections = [
        f"# {_inline(report.get('name') or 'Report')}",
        _inline(sentence(report, summary)),
        _headline(report, summary),
        "## Latency\n\n" + _latency(report, summary),
        "## Verification of the exported file\n\n" + _verification(report, summary),
    ]
    header, rows = layer_rows(report)
    if rows:
        sections.append("## Shape of each layer\n\n" + _table(header, rows))
    for title, said, columns, found in analysis_tables(report):
        sections.append(f"## {_inline(title)}\n\n{_inline(said)}\n\n{_table(columns, found)}")
    sections.append("## Use\n\n" + (usage or onnx_usage(report, "onnx")))
    if report.get("seconds"):
        sections.append("## Time\n\n" + _time(report))
    if report.get("notes"):
        sections.append("## Notes\n\n" + "\n".join(f"- {_inline(note)}" for note in report["notes"]))
    sections.append("## Made with\n\n" + _made_with(report))
    return "\n\n".join(sections) + "\n"


def _headline(report: dict, summary: Summary) -> str:
    quality, sizes, parameters = (part(report, key) for key in ("quality", "size_bytes", "parameters"))
    parity, training, metric = part(report, "parity"), part(report, "training"), summary.metric
    title = f"{numbers.metric_title(metric)} ({summary.split})"
    baseline = numbers.score(metric, quality.get("baseline"))
    rows = [
        [f"{title}, torch", baseline, numbers.score(metric, quality.get("torch")),
         numbers.score_difference(metric, summary.torch_difference)],
        [f"{title}, ONNX Runtime", baseline, numbers.score(metric, quality.get("onnx")),
         numbers.score_difference(metric, summary.onnx_difference)],
        ["ONNX file", numbers.size(sizes.get("base_onnx")), numbers.size(sizes.get("onnx")),
         numbers.change(summary.size_change)],
        ["parameters", numbers.count(parameters.get("base")), numbers.count(parameters.get("total")),
         numbers.change(summary.parameter_change)],
    ]  # fmt: skip
    if summary.headline:
        row = summary.headline
        rows.append([f"latency at {row.label} (batch{numbers.TIMES}length), p50", numbers.milliseconds(row.base),
                     numbers.milliseconds(row.compressed), f"{numbers.ratio(row.speed_up)} speed"])  # fmt: skip
    lines = [f"Largest output difference between torch and ONNX: {numbers.error(parity.get('max_abs_error'))}."]
    if parity.get("label_agreement") is not None:
        lines.append(f"Same label in both for {numbers.percent(parity['label_agreement'])} of the rows.")
    lines += [f"{line[:1].upper()}{line[1:]}." for line in target_lines(report)]
    lines.append(f"Training took {numbers.duration(training.get('seconds'))}.")
    if report.get("peak_memory_bytes") is not None:
        size = numbers.size(report["peak_memory_bytes"])
        lines.append(f"The process took {size} of memory at most, export and verification included.")
    return _table(["", "base", "compressed", "change"], rows) + "\n\n" + " ".join(lines)


def _latency(report: dict, summary: Summary) -> str:
    if not summary.latencies:
        return f"Latency: {numbers.MISSING}."
    rows = [
        [row.label, *(numbers.milliseconds(value) for value in (row.torch, row.base, row.compressed)),
         numbers.ratio(row.speed_up), numbers.ratio(row.speed_up_torch)]
        for row in summary.latencies
    ]  # fmt: skip
    header = [f"batch{numbers.TIMES}length", "torch, base", "ONNX, base", "ONNX, compressed", "against ONNX base",
              "against torch"]  # fmt: skip
    return _table(header, rows) + f"\n\nMedian (p50). {_inline(measured_on(report))}"


def _verification(report: dict, summary: Summary) -> str:
    rows = [
        [str(row.get("split")), str(row.get("kernels") or "default"), str(row.get("batch")),
         numbers.whole(row.get("rows")),
         numbers.error(row.get("max_abs_error")), numbers.percent(row.get("label_agreement")),
         numbers.score(summary.metric, row.get("torch")), numbers.score(summary.metric, row.get("onnx"))]
        for row in report.get("verification") or []
    ]  # fmt: skip
    if not rows:
        return f"Verification: {numbers.MISSING}."
    title = numbers.metric_title(summary.metric)
    header = ["split", "kernels", "batch", "rows", "largest difference", "same label", f"{title}, torch",
              f"{title}, ONNX"]  # fmt: skip
    said = portable_sentence(report)
    return _table(header, rows, text_columns=2) + (f"\n\n{_inline(said)}" if said else "")


def onnx_usage(report: dict, folder: str) -> str:
    """How the exported file is loaded from a folder, as a block of Python."""
    if not summarise(report).exported:
        return "No ONNX file was measured in this run."
    reading = _READING.get(str(report.get("task")), "print(logits.shape)")
    return f"""\
```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
session = onnxruntime.InferenceSession("{folder}/model.onnx", providers=["CPUExecutionProvider"])
inputs = {{entry.name for entry in session.get_inputs()}}
batch = tokenizer(["Your text here."], padding=True, truncation=True, return_tensors="np")
logits = session.run(None, {{name: array for name, array in batch.items() if name in inputs}})[0]
{reading}
```"""


def _time(report: dict) -> str:
    rows = [[phase, numbers.duration(seconds), numbers.percent(share)] for phase, seconds, share in time_rows(report)]
    return _table(["phase", "time", "share"], rows)


def _made_with(report: dict) -> str:
    facts = [("recipe", report.get("recipe_hash")), ("model", report.get("model")), ("task", report.get("task"))]
    facts += sorted(part(report, "versions").items())
    return _table(["", ""], [[str(name), str(value)] for name, value in facts if value is not None], text_columns=2)


def measured_on(report: dict) -> str:
    """One line on the machine; what is unknown is left out."""
    hardware = part(report, "hardware")
    facts = [str(hardware["cpu"])] if hardware.get("cpu") else []
    if hardware.get("cores") is not None:
        facts.append(f"{hardware['cores']} core{'s' * (hardware['cores'] != 1)}")
    if hardware.get("memory_bytes") is not None:
        facts.append(f"{numbers.size(hardware['memory_bytes'])} memory")
    threads = {row.get("threads") for row in report.get("latency_ms") or []} - {None}
    if len(threads) == 1:
        number = threads.pop()
        facts.append(f"{number} thread{'s' * (number != 1)}")
    return f"Measured on {', '.join(facts)}." if facts else "The machine was not recorded."


def _table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    cells = [[_inline(cell) for cell in row] for row in (header, *rows)]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _inline(value: object) -> str:
    """Text that stays text: no HTML, no table break, no new line."""
    text = " ".join(str(value).split()).replace("\\", "\\\\")
    for character in "|`*_[]":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
