"""Every figure derived from report.json (differences, ratios, speed-ups) and the one sentence that says them."""

from dataclasses import dataclass

from compressft.run.report import numbers

HEADLINE_SHAPE = (1, 128)  # batch, length


@dataclass(frozen=True)
class Latency:
    """The rows measured at one batch, length and number of threads; only these may be compared."""

    batch: int
    length: int
    threads: int | None
    compressed: float | None  # p50 in ms, ONNX Runtime
    base: float | None  # p50 in ms, ONNX Runtime, fp32
    torch: float | None  # p50 in ms, torch eager, fp32
    label: str

    @property
    def speed_up(self) -> float | None:
        """Compressed against base, both in ONNX Runtime."""
        return divide(self.base, self.compressed)

    @property
    def speed_up_torch(self) -> float | None:
        """Compressed in ONNX Runtime against base in torch eager."""
        return divide(self.torch, self.compressed)


@dataclass(frozen=True)
class Summary:
    """Derived figures; None where an operand was not measured."""

    metric: str
    split: str
    torch_difference: float | None  # quality, torch - baseline
    onnx_difference: float | None  # quality, onnx - baseline
    size_change: float | None  # onnx / base_onnx - 1
    parameter_change: float | None  # total / base - 1
    latencies: tuple[Latency, ...]
    headline: Latency | None
    exported: bool


def summarise(report: dict) -> Summary:
    quality, sizes, parameters = (part(report, key) for key in ("quality", "size_bytes", "parameters"))
    latencies = _latencies(report.get("latency_ms") or [])
    return Summary(
        metric=str(quality.get("metric") or "metric"),
        split=str(quality.get("split") or "test"),
        torch_difference=subtract(quality.get("torch"), quality.get("baseline")),
        onnx_difference=subtract(quality.get("onnx"), quality.get("baseline")),
        size_change=subtract(divide(sizes.get("onnx"), sizes.get("base_onnx")), 1),
        parameter_change=subtract(divide(parameters.get("total"), parameters.get("base")), 1),
        latencies=latencies,
        headline=_headline(latencies),
        exported=numbers.is_number(sizes.get("onnx")),
    )


def sentence(report: dict, summary: Summary) -> str:
    """What the run achieved, in plain words; says only what was measured."""
    quality = part(report, "quality")
    facts = []
    value, where = quality.get("onnx"), "in ONNX Runtime"
    difference = summary.onnx_difference
    if not numbers.is_number(value):
        value, where, difference = quality.get("torch"), "in torch", summary.torch_difference
    if numbers.is_number(value):
        scored = f"{numbers.score(summary.metric, value)} {numbers.metric_title(summary.metric)}"
        fact = f"scores {scored} on {summary.split} {where}"
        if difference is not None:
            fact += f" ({numbers.score_difference(summary.metric, difference)} against the dense baseline)"
        facts.append(fact)
    if summary.size_change is not None:
        facts.append(_smaller(summary.size_change))
    if summary.headline and summary.headline.speed_up is not None:
        facts.append(_faster(summary.headline))
    if not facts:
        return "Nothing was measured in this run."
    subject = "The exported ONNX file" if summary.exported else "The trained model"
    return f"{subject} {_join(facts)}."


def portable_sentence(report: dict) -> str | None:
    """That the file's integer sums are the same on every processor, and why; notes say where they are not."""
    sums = part(report, "pair_sums")
    if not report.get("portable") or not sums.get("products"):
        return None
    return (
        f"The same integer sums on every processor: no pair of products passes {numbers.whole(sums.get('largest'))}, "
        f"and 16 bits hold {numbers.whole(sums.get('limit'))}."
    )


def target_lines(report: dict) -> list[str]:
    """What the recipe's targets asked for, and what came of them."""
    lines = []
    for row in report.get("targets") or []:
        name = str(row.get("target"))
        at = "" if row.get("batch") is None else f" at {numbers.shape(row['batch'], row.get('length'))}"
        asked, got = (_in_unit(name, row.get(key)) for key in ("asked", "reached"))
        lines.append(f"{_TARGETS.get(name, name)}: {asked} asked for, {got} reached{at}")
    return lines


_TARGETS = {"latency_ms": "latency", "speedup": "speed-up", "bytes": "bytes of weights"}


def _in_unit(name: str, value: object) -> str:
    if not numbers.is_number(value):
        return numbers.MISSING
    if name == "speedup":
        return numbers.ratio(value)
    if name == "latency_ms":
        return numbers.milliseconds(value)
    if name == "bytes":
        return numbers.size(value)
    return numbers.percent(value) if value <= 1 else numbers.count(value)


def part(report: dict, key: str) -> dict:
    """A section of the report; empty when it is absent or null."""
    return report.get(key) or {}


def divide(a: object, b: object) -> float | None:
    return a / b if numbers.is_number(a) and numbers.is_number(b) and b else None


def subtract(a: object, b: object) -> float | None:
    return a - b if numbers.is_number(a) and numbers.is_number(b) else None


def time_rows(report: dict) -> list[tuple[str, float, float]]:
    """(phase, seconds, share of all) of what the run's time went to, and of all together."""
    spent = {name: value for name, value in part(report, "seconds").items() if numbers.is_number(value)}
    total = sum(spent.values())
    return [(name, value, value / total) for name, value in {**spent, "all": total}.items()] if total else []


def layer_rows(report: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of shapes per layer: position, then base and kept of every part."""
    base, kept = layers(report)
    parts = shape_parts(report)
    header = ["layer", *(f"{name}, {when}" for name in parts for when in ("base", "kept"))]
    rows = []
    for index in range(max(len(base), len(kept))):
        pair = [side[index] if index < len(side) else {} for side in (base, kept)]
        rows.append([str(index), *(str(layer.get(name, numbers.NOTHING)) for name in parts for layer in pair)])
    return header, rows


def layers(report: dict) -> tuple[list[dict], list[dict]]:
    """Shapes of the layers before and after; a layer recorded as null has been removed and is an empty dict."""
    shapes = part(report, "shapes")
    base, kept = ([layer or {} for layer in shapes.get(side) or []] for side in ("base", "kept"))
    return base, kept


def shape_parts(report: dict) -> list[str]:
    """What is counted per layer ("heads", "ffn", ...), in order of appearance."""
    return list(dict.fromkeys(name for side in layers(report) for layer in side for name in layer))


def _latencies(rows: list[dict]) -> tuple[Latency, ...]:
    groups: dict[tuple, dict[tuple, object]] = {}
    for row in rows:
        key = (row.get("batch"), row.get("length"), row.get("threads"))
        groups.setdefault(key, {})[row.get("runtime"), row.get("model")] = row.get("p50")
    several = len({threads for _, _, threads in groups}) > 1
    found = []
    for (batch, length, threads), p50 in groups.items():
        label = numbers.shape(batch, length)
        if several:
            label += " (threads unknown)" if threads is None else f" ({threads} thread{'s' * (threads != 1)})"
        row = Latency(
            batch=batch,
            length=length,
            threads=threads,
            compressed=_number(p50.get(("onnxruntime", "compressed"))),
            base=_number(p50.get(("onnxruntime", "base_fp32"))),
            torch=_number(p50.get(("torch", "base_fp32"))),
            label=label,
        )
        found.append(row)
    return tuple(found)


def _number(value: object) -> float | None:
    return value if numbers.is_number(value) else None


def _headline(latencies: tuple[Latency, ...]) -> Latency | None:
    comparable = [row for row in latencies if row.speed_up is not None] or list(latencies)
    exact = [row for row in comparable if (row.batch, row.length) == HEADLINE_SHAPE]
    return next(iter(exact + comparable), None)


def _smaller(size_change: float) -> str:
    text = numbers.change(abs(size_change)).lstrip("+")
    return f"is {text} {'smaller' if size_change <= 0 else 'larger'} than the base in ONNX"


def _faster(row: Latency) -> str:
    speed_up = row.speed_up
    assert speed_up is not None
    where = f"in ONNX Runtime at batch {row.batch}, length {row.length}"
    if speed_up >= 1:
        return f"answers {numbers.ratio(speed_up)} as fast as the base {where}"
    return f"is slower than the base ({numbers.ratio(speed_up)} its speed) {where}"


def _join(facts: list[str]) -> str:
    return facts[0] if len(facts) == 1 else ", ".join(facts[:-1]) + " and " + facts[-1]


# Rows of an analysis's table that a page shows; report.json has all.
MOST_ROWS = 60


def analysis_tables(report: dict) -> list[tuple[str, str, list[str], list[list[str]]]]:
    """Of each analysis its title, what it found, and its table, cut where it is long."""
    tables = []
    for found in report.get("analyses") or ():
        rows = [[numbers.cell(value) for value in row] for row in found["rows"][:MOST_ROWS]]
        said = ". ".join([found["sentence"], *(found.get("notes") or ())])
        if len(found["rows"]) > MOST_ROWS:
            said += f". The first {MOST_ROWS} of {len(found['rows'])} rows; report.json has all"
        tables.append((found["title"], f"{said}.", list(found["columns"]), rows))
    return tables
