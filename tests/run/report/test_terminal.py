"""The table on the terminal."""
# ruff: noqa: RUF001 (the report prints true minus and multiplication signs)

import io

import pytest
from rich.console import Console

from compressft.run.report import numbers, terminal_table
from compressft.run.report.markdown import render_markdown


def _text(report, width=80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal_table(report))
    return console.export_text()


def test_figures_are_there_and_fit(report):
    text = _text(report)
    assert max(map(len, text.splitlines())) <= 80
    for figure in ("92.10%", "91.80%", "−0.30 points", "91.70%", "−0.40 points", "−82.5%", "22.7 M", "15.0 M", "6.19×",
                   "8.87×", "14.2 ms", "0.0312", "99.80%", "4 min 0 s", "at most 2.3 GB"):  # fmt: skip
        assert figure in text, figure
    # Nothing was folded: one line per row.
    assert sum(line.strip().startswith(("1×32", "1×128", "8×128")) and "ms" in line for line in text.splitlines()) == 3
    assert len(text.splitlines()) <= 25


def test_the_longest_phases_are_named(report):
    assert " time: 5 min 0 s, of it training 3 min 20 s, evaluation 40.0 s, search 30.0 s" in _text(report)


def test_large_figures_still_fit_on_one_line(report):
    for row in report["latency_ms"]:
        row["p50"] = row["p50"] * 1000
        row["batch"], row["length"] = row["batch"] * 16, row["length"] * 8
    text = _text(report)
    assert max(map(len, text.splitlines())) <= 80
    assert any(line.count(" ms") == 3 and line.count("×") == 3 for line in text.splitlines())


def test_notes_are_shown(report):
    report["notes"] = ["target.speedup: 9.3 was asked for at 1x128, 2.5 was measured."]
    assert " note: target.speedup: 9.3 was asked for at 1x128, 2.5 was measured." in _text(report)


@pytest.mark.parametrize("report", [{}, {"latency_ms": None, "quality": None}])
def test_nothing_measured(report):
    text = _text(report)
    assert numbers.MISSING in text
    assert "None" not in text


def test_names_are_not_read_as_markup(report):
    report |= {"name": "[bold]x[/bold]" + "y" * 100}
    report["quality"]["split"] = "[red]t[/red]"
    text = _text(report)
    assert "[bold]x[/bold]" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"target": "speedup", "asked": 10.0, "reached": 16.3, "batch": 1, "length": 128},
         "speed-up: 10.0× asked for, 16.3× reached at 1×128"),
        ({"target": "latency_ms", "asked": 2.0, "reached": 1.5, "batch": 8, "length": 32},
         "latency: 2.00 ms asked for, 1.50 ms reached at 8×32"),
        ({"target": "sparsity", "asked": 0.75, "reached": 0.7512, "batch": None, "length": None},
         "sparsity: 75.00% asked for, 75.12% reached"),
        ({"target": "parameters", "asked": 3e6, "reached": 2.9e6, "batch": None, "length": None},
         "parameters: 3.0 M asked for, 2.9 M reached"),
        ({"target": "bytes", "asked": 4e6, "reached": 3.9e6, "batch": None, "length": None},
         "bytes of weights: 4.0 MB asked for, 3.9 MB reached"),
    ],
)  # fmt: skip
def test_targets_are_named_with_what_was_reached(report, row, line):
    report["targets"] = [row]
    assert f" target: {line}" in _text(report)
    assert f"{line[0].upper()}{line[1:]}." in render_markdown(report)
