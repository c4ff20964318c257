"""Formatting of figures and the derived ones: differences, ratios, speed-ups."""
# ruff: noqa: RUF001 (the report prints true minus and multiplication signs)

import dataclasses

import pytest

from compressft.run.report import numbers
from compressft.run.report.summary import sentence, summarise


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.917, "91.70%"),
        ("macro_f1", 0.5, "50.00%"),
        ("accuracy", 0.99999, ">99.99%"),
        ("accuracy", 1.0, "100.00%"),
        ("pearson", 0.8812, "0.881"),
        ("matthews", -0.03, "−0.030"),
        ("perplexity", 12.3456, "12.346"),
        ("bleu", 30.1, "30.100"),
        ("accuracy", None, numbers.MISSING),
        ("accuracy", float("nan"), numbers.MISSING),
        ("accuracy", True, numbers.MISSING),
    ],
)
def test_score(metric, value, text):
    assert numbers.score(metric, value) == text


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", -0.004, "−0.40 points"),
        ("accuracy", 0.004, "+0.40 points"),
        ("accuracy", -1e-9, "0.00 points"),
        ("perplexity", 0.25, "+0.250"),
        ("accuracy", None, numbers.MISSING),
    ],
)
def test_score_difference(metric, value, text):
    assert numbers.score_difference(metric, value) == text


def test_units_change_where_the_rounded_figure_does():
    assert [numbers.size(value) for value in (0, 999, 1000, 91_600_000, 999_960_000)] == [
        "0 B", "999 B", "1.0 kB", "91.6 MB", "1.0 GB",
    ]  # fmt: skip
    assert numbers.count(22_713_986) == "22.7 M"
    assert [numbers.milliseconds(value) for value in (0.62, 9.994, 9.999, 99.96)] == [
        "0.62 ms", "9.99 ms", "10.0 ms", "100 ms",
    ]  # fmt: skip
    assert [numbers.duration(value) for value in (8.2, 59.97, 240, 5400)] == [
        "8.2 s", "1 min 0 s", "4 min 0 s", "1 h 30 min",
    ]  # fmt: skip


def test_direction_of_metrics():
    assert all(map(numbers.lower_is_better, ("perplexity", "eval_loss", "mse")))
    assert not any(map(numbers.lower_is_better, ("accuracy", "f1", "pearson", "matthews", None)))


def test_derived_figures(report):
    summary = summarise(report)
    assert summary.onnx_difference == pytest.approx(-0.004)
    assert summary.torch_difference == pytest.approx(-0.003)
    assert summary.size_change == pytest.approx(16 / 91.6 - 1)
    assert summary.parameter_change == pytest.approx(15 / 22.713986 - 1)
    assert (summary.headline.batch, summary.headline.length) == (1, 128)
    assert summary.headline.speed_up == pytest.approx(9.9 / 1.6)
    assert summary.headline.speed_up_torch == pytest.approx(14.2 / 1.6)
    assert [row.label for row in summary.latencies] == ["1×32", "1×128", "8×128"]


def test_only_equal_numbers_of_threads_are_compared(report):
    base = report["latency_ms"][1]
    report["latency_ms"] = [
        {**base, "model": "compressed", "p50": 2.0, "threads": 1},
        {**base, "p50": 8.0, "threads": 2},
    ]
    assert all(row.speed_up is None for row in summarise(report).latencies)
    report["latency_ms"].append({**base, "p50": 12.0, "threads": 1})
    summary = summarise(report)
    assert summary.headline.speed_up == 6.0
    assert summary.headline.label == "1×32 (1 thread)"


@pytest.mark.parametrize("p50", [0, None, float("nan")])
def test_no_speed_up_from_an_unusable_time(report, p50):
    for row in report["latency_ms"]:
        if row["model"] == "compressed":
            row["p50"] = p50
    assert all(row.speed_up is None for row in summarise(report).latencies)


def test_empty_report_has_no_derived_figures():
    values = dataclasses.asdict(summarise({}))
    assert {key for key, value in values.items() if value} == {"metric", "split"}
    assert sentence({}, summarise({})) == "Nothing was measured in this run."


def test_sentence_says_when_it_got_worse(report):
    report["size_bytes"]["onnx"] = 100_000_000
    for row in report["latency_ms"]:
        if row["model"] == "compressed":
            row["p50"] = 20.0
    text = sentence(report, summarise(report))
    assert "larger than the base" in text
    assert "is slower than the base" in text
    assert "−0.40 points" in text
