"""compression.json as Markdown: only what was measured; what has not run yet is a dash."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any


def render(document: dict[str, Any]) -> str:
    """All tables."""
    found = document["cases"]
    sections = [
        "# Compression",
        "`python -m benchmarks compression`; MiniLM-L6, real data (sst2: 6,920 sentences; sst2-all: 12,000 phrases "
        "besides; banking77: all rows), accuracy on the test split. A dash has not run yet.",
        "## Dense models, fine-tuned: the teachers",
        _table(["task", "test", "validation"], [_dense(n, c) for n, c in found.items() if c["group"] == "teacher"]),
        "## Files for the edge",
        _edge({n: c for n, c in found.items() if c["group"] == "edge"}, found),
        *_limits([case["costs"] for case in found.values() if "costs" in case]),
        "## Accuracy against remaining weights of the layers (sst2)",
        _pruning(found),
        "## Quantisation-aware training against rounding afterwards",
        _quantising(found),
        "## The joint run against the same passes one after the other, at equal steps",
        _joint(found),
        "## Step time of each pass next to the plain distillation step",
        _overhead(document.get("overhead") or {}),
    ]
    hardware, versions = document.get("hardware", {}), document.get("versions", {})
    facts = [f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('cores', '?')} cores"]
    facts += [f"{name} {value}" for name, value in versions.items()]
    return "\n\n".join([*sections, ", ".join(facts)]) + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _score(case: dict[str, Any] | None, key: str = "torch") -> float | None:
    return None if case is None else case["quality"][key]


def _dense(name: str, case: dict[str, Any]) -> list[str]:
    validation = case["validation"][-1].get("accuracy")
    return [name.removesuffix("-teacher"), _percent(_score(case)), _percent(validation)]


def _edge(edge: dict[str, Any], found: dict[str, Any]) -> str:
    rows = []
    for name, case in edge.items():
        base = _score(found.get(f"{case['task']}-teacher"))
        score = _score(case, "onnx")
        size = case["size_bytes"]
        p50 = {
            (row["model"], row["batch"], row["length"]): row["p50"]
            for row in case["latency_ms"]
            if row["runtime"] == "onnxruntime"
        }
        speed = [
            f"{p50['compressed', *shape]:.2f} ms, {p50['base_fp32', *shape] / p50['compressed', *shape]:.1f}x"
            for shape in ((1, 32), (1, 128), (8, 128))
            if ("compressed", *shape) in p50
        ]
        loss = "-" if base is None or score is None else f"{100 * (score - base):+.2f}"
        share = f"{size['onnx'] / 1e6:.2f} MB, {100 * size['onnx'] / size['base_onnx']:.1f} %"
        agreement = _percent(case["parity"]["label_agreement"])
        asked = f"{case['asked']:g}x" if case.get("asked") else "-"
        rows.append([name, _percent(score), loss, agreement, share, asked, *(speed + ["-"] * (3 - len(speed)))])
    header = ["file", "ONNX accuracy", "against dense, points", "same label as torch", "bytes, share of fp32"]
    header += ["asked for", "1x32", "1x128", "8x128"]
    return _table(header, rows) + (
        "\n\nLatency: p50 in onnxruntime and how many times faster than the fp32 ONNX of the dense model, "
        "measured in the same minutes. The sst2 files' dense model is sst2-all's, and its answers to rewritten rows "
        "and to sentences of film reviews without labels are most of what they learn from."
    )


def _limits(tables: list[dict[str, Any]]) -> list[str]:
    """What parts of the exported model cost, by the table that a target was met with."""
    if not tables:
        return []
    costs = tables[-1]
    about, last = costs["about"], costs["last"]
    rows = []
    for name, sizes, kind in (("heads", "groups", "attention"), ("neurons", "neurons", "ffn")):
        for part, place in ((costs, "a layer"), (last, "the last layer")):
            if part is not None:
                ends = (part[sizes][0], part[kind][0]), (part[sizes][-1], part[kind][-1])
                rows.append([place, name, *(f"{size}: {1e3 * ms:.0f} us" for size, ms in ends)])
    least = costs["attention"][0] + costs["ffn"][0] + costs["layer"]
    return [
        f"### What limits them: the int8 model's parts at {about['batch']}x{about['length']}",
        _table(["where", "part", "smallest", "whole"], rows),
        f"Embeddings, pooler and head: {1e3 * costs['rest']:.0f} us. The fp32 model: {costs['reference']:.2f} ms, so "
        f"20 times as fast is {50 * costs['reference']:.0f} us: what is left after embeddings and head pays for "
        f"{(costs['reference'] / 20 - costs['rest']) / least:.1f} layers of the smallest shape "
        "(a layer's norms, roundings and softmax stay, however narrow it is).",
    ]


def _pruning(found: dict[str, Any]) -> str:
    rows = []
    for kind in ("magnitude", "movement-from-magnitude", "movement-from-zero", "structured", "ziplm"):
        for distilled in (True, False):
            row = [kind, "with" if distilled else "without"]
            for kept in (50, 25, 10, 5):
                scores = [
                    case["quality"]["torch"]
                    for case in found.values()
                    if case["group"] == "pruning"
                    and (case["pass"], case["kept"], case["distilled"]) == (kind, kept, distilled)
                ]
                row.append(_several(scores))
            rows.append(row)
    return _table(["pass", "distillation", "50 %", "25 %", "10 %", "5 %"], rows) + (
        "\n\nFive epochs. movement-from-magnitude is the pass as it is by default: its scores start at |weight|, all "
        "layers together. movement-from-zero is the paper's form, scores from 0 and each layer by itself: the first "
        "weights to go are no small ones, and most runs do not recover from it."
    )


def _several(scores: list[float]) -> str:
    if not scores:
        return "-"
    if len(scores) == 1:
        return _percent(scores[0])
    return f"{100 * mean(scores):.2f} ± {100 * stdev(scores):.2f} % ({len(scores)} seeds)"


def _quantising(found: dict[str, Any]) -> str:
    rows = []
    for task in ("sst2", "banking77"):
        for form in ("int8", "int4"):
            scores = [_score(found.get(f"{task}-{form}-{how}")) for how in ("afterwards", "aware")]
            rows.append([task, form, _percent(_score(found.get(f"{task}-teacher"))), *map(_percent, scores)])
    return _table(["task", "form", "dense", "rounded afterwards", "trained with it"], rows)


def _joint(found: dict[str, Any]) -> str:
    rows = []
    for task in ("sst2", "banking77"):
        scores = [_score(found.get(f"{task}-{how}")) for how in ("joint", "sequence", "sequence-distilled")]
        rows.append([task, *map(_percent, scores)])
    return _table(["task", "joint", "prune, distil, quantise", "the same, distilled throughout"], rows)


def _overhead(measured: dict[str, Any]) -> str:
    rows = [[name, f"{value['step_ms']:.0f} ms", f"{value['ratio']:.2f}"] for name, value in measured.items()]
    return _table(["passes", "step", "ratio"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return "Not measured yet."
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
