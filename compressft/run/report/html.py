"""report.html: one self-contained page; jinja2 escapes every string that came from outside."""

from compressft.run.report import numbers
from compressft.run.report.figures import Picture
from compressft.run.report.markdown import measured_on
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
from compressft.run.report.template import PAGE


def render_html(report: dict, pictures: list[Picture]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    summary = summarise(report)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        title=str(report.get("name") or "Report"),
        subtitle=[str(report[key]) for key in ("model", "task") if report.get(key)],
        sentence=sentence(report, summary),
        machine=measured_on(report),
        tiles=_tiles(report, summary),
        # Our own drawing, in which matplotlib has already escaped the text.
        pictures=[(picture, Markup(picture.svg)) for picture in pictures],
        tables=[table for table in _tables(report, summary) if table["rows"]],
        recipe=report.get("recipe"),
        recipe_hash=report.get("recipe_hash"),
        notes=[str(note) for note in _notes(report) if note],
        missing=numbers.MISSING,
    )


def _notes(report: dict) -> list:
    found = [f"{title}: {said}" for title, said, *_ in analysis_tables(report)]
    return [portable_sentence(report), *target_lines(report), *found, *(report.get("notes") or [])]


def _tiles(report: dict, summary: Summary) -> list[dict]:
    quality, sizes, parity = (part(report, key) for key in ("quality", "size_bytes", "parity"))
    metric, row = summary.metric, summary.headline
    title = f"{numbers.metric_title(metric)}, {summary.split}"
    if numbers.is_number(quality.get("onnx")):
        shown, difference, where = quality["onnx"], summary.onnx_difference, "in ONNX Runtime"
    else:
        shown, difference, where = quality.get("torch"), summary.torch_difference, "in torch"
    against = "no baseline in this run"
    if difference is not None:
        against = f"{numbers.score_difference(metric, difference)} against {numbers.score(metric, quality['baseline'])}"
    tiles = [_tile(title, numbers.score(metric, shown), f"{where}; {against}")]
    if row is None:
        tiles.append(_tile("Speed-up", numbers.MISSING, "no latency rows in this run"))
    else:
        times = f"{numbers.milliseconds(row.base)} to {numbers.milliseconds(row.compressed)}, ONNX Runtime"
        tiles.append(_tile(f"Speed-up at {row.label}", numbers.ratio(row.speed_up), times))
    change = "" if summary.size_change is None else f" ({numbers.change(summary.size_change)})"
    before = f"base {numbers.size(sizes.get('base_onnx'))}{change}"
    tiles.append(_tile("ONNX file", numbers.size(sizes.get("onnx")), before))
    largest = f"largest output difference {numbers.error(parity.get('max_abs_error'))}"
    if parity.get("label_agreement") is None:
        tiles.append(_tile("Torch to ONNX", numbers.error(parity.get("max_abs_error")), "largest output difference"))
    else:
        tiles.append(_tile("Same label, torch and ONNX", numbers.percent(parity["label_agreement"]), largest))
    return tiles


def _tile(title: str, value: str, detail: str) -> dict:
    return {"title": title[:1].upper() + title[1:], "value": value, "detail": detail}


def _tables(report: dict, summary: Summary) -> list[dict]:
    header, rows = layer_rows(report)
    return [
        _table("Quality", ["", "baseline", "compressed", "difference"], _quality(report, summary)),
        _table("Size and parameters", ["", "base", "compressed", "change"], _sizes(report, summary)),
        _table(
            "Speed-up",
            ["shape", "torch, base", "ONNX, base", "compressed", "against ONNX", "against torch"],
            [
                [row.label, *(numbers.milliseconds(value) for value in (row.torch, row.base, row.compressed)),
                 numbers.ratio(row.speed_up), numbers.ratio(row.speed_up_torch)]
                for row in summary.latencies
            ],
        ),
        _table(
            "Latency, every row",
            ["runtime", "model", "shape", "threads", "p50", "p90"],
            [
                [row.get("runtime"), row.get("model"), numbers.shape(row.get("batch"), row.get("length")),
                 row.get("threads"), numbers.milliseconds(row.get("p50")), numbers.milliseconds(row.get("p90"))]
                for row in report.get("latency_ms") or []
            ],
            text_columns=2,
        ),
        _table(
            "Verification of the exported file",
            ["split", "kernels", "batch", "rows", "largest difference", "same label", "torch", "ONNX"],
            [
                [row.get("split"), row.get("kernels") or "default", row.get("batch"), numbers.whole(row.get("rows")),
                 numbers.error(row.get("max_abs_error")), numbers.percent(row.get("label_agreement")),
                 numbers.score(summary.metric, row.get("torch")), numbers.score(summary.metric, row.get("onnx"))]
                for row in report.get("verification") or []
            ],
            text_columns=2,
        ),
        _table("Stages", ["stage", "time", "steps", "ex/s", "validation", "best"], _stages(report)),
        _table("Training", ["", ""], _training(report)),
        _table("Time", ["phase", "time", "share"], [
            [name, numbers.duration(value), numbers.percent(share)] for name, value, share in time_rows(report)
        ]),
        _table("Shape of each layer", header, rows),
        *(_table(title, columns, found) for title, _, columns, found in analysis_tables(report)),
        _table("Hardware", ["", ""], _hardware(report), text_columns=2),
        _table("Versions", ["", ""], sorted(part(report, "versions").items()), text_columns=2),
    ]  # fmt: skip


def _table(title: str, header: list[str], rows: list, text_columns: int = 1) -> dict:
    cells = [[numbers.NOTHING if cell is None else str(cell) for cell in row] for row in rows]
    return {"title": title, "header": header if any(header) else [], "rows": cells, "text_columns": text_columns}


def _quality(report: dict, summary: Summary) -> list[list[str]]:
    quality, metric = part(report, "quality"), summary.metric
    return [
        [f"{numbers.metric_title(metric)}, {summary.split}, {place}", numbers.score(metric, quality.get("baseline")),
         numbers.score(metric, quality.get(key)), numbers.score_difference(metric, difference)]
        for place, key, difference in (
            ("torch", "torch", summary.torch_difference),
            ("ONNX Runtime", "onnx", summary.onnx_difference),
        )
    ]  # fmt: skip


def _sizes(report: dict, summary: Summary) -> list[list[str | None]]:
    sizes, parameters = part(report, "size_bytes"), part(report, "parameters")
    rows = [
        ["ONNX file", numbers.size(sizes.get("base_onnx")), numbers.size(sizes.get("onnx")),
         numbers.change(summary.size_change)],
        ["parameters", numbers.count(parameters.get("base")), numbers.count(parameters.get("total")),
         numbers.change(summary.parameter_change)],
        ["of these not zero", None, numbers.count(parameters.get("nonzero")), None],
        ["of these trained", None, numbers.count(parameters.get("trainable")), None],
        ["model folder (safetensors)", None, numbers.size(sizes.get("model")), None],
        ["delta", None, numbers.size(sizes.get("delta")), None],
    ]  # fmt: skip
    return rows


def _stages(report: dict) -> list[list[str | None]]:
    return [
        [stage.get("name"), numbers.duration(stage.get("seconds")), numbers.whole(stage.get("steps")),
         numbers.rate(stage.get("examples_per_second"), "examples").removesuffix(" examples/s"),
         _scores(stage.get("validation")), _scores(stage.get("best"))]
        for stage in report.get("stages") or []
    ]  # fmt: skip


def _scores(value: object) -> str | None:
    if not isinstance(value, dict):
        return None if value is None else str(value)
    return "\n".join(f"{numbers.metric_title(name)} {numbers.score(name, item)}" for name, item in value.items())


def _training(report: dict) -> list[list[str]]:
    training = part(report, "training")
    return [
        ["time", numbers.duration(training.get("seconds"))],
        ["examples", numbers.rate(training.get("examples_per_second"), "examples")],
        ["tokens", numbers.rate(training.get("tokens_per_second"), "tokens")],
        ["peak memory", numbers.size(training.get("peak_memory_bytes"))],
        ["peak memory, whole run", numbers.size(report.get("peak_memory_bytes"))],
    ]


def _hardware(report: dict) -> list[list[str]]:
    return [
        [name.removesuffix("_bytes"), numbers.size(value) if name.endswith("_bytes") else value]
        for name, value in part(report, "hardware").items()
    ]
