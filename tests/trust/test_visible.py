"""Text of strangers on a terminal and in a report: seen, never obeyed."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from compressft.run.report import terminal_table, write_report
from compressft.utils.visible import DIRECTIONS, LAYOUT, PlainConsole, all_visible, visible

TITLE, LINK, C1, TURNED = "\x1b]0;owned\x07", "\x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\", "\x9b31mred", "\u202etxt.exe"
ODD = st.text(st.characters() | st.sampled_from("\x1b\x07\x08\x9b\x9d\x00\r\n\t\u202e\u2066\ud800[]:/"), max_size=30)


def harmless(text: str) -> bool:
    return not any(
        (unicodedata.category(c) in ("Cc", "Cs") and c not in LAYOUT) or c in DIRECTIONS for c in text
    )  # fmt: skip


@settings(max_examples=200)
@given(ODD)
def test_nothing_hidden_is_left_and_nothing_else_changes(text):
    shown = visible(text)
    assert harmless(shown)
    assert visible(shown) == shown
    if harmless(text):
        assert shown == text
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b[31m", "\\x1b[31m"), ("a\rb", "a\\rb"), ("\x9b", "\\x9b"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"),
     ("é\tü\n中", "é\tü\n中")],
)  # fmt: skip
def test_escapes(text, shown):
    assert visible(text) == shown


def test_plain_data():
    assert all_visible({"a\x1b": ["\x07", 1, None, ("\x00",)]}) == {"a\\x1b": ["\\x07", 1, None, ["\\x00"]]}


@settings(max_examples=100)
@given(ODD)
def test_a_console_shows_it_whole(text):
    import contextlib
    import io

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        console = PlainConsole()
        console.print(text, soft_wrap=True)
        console.print(Text(text))
        table = Table("name", box=None)
        table.add_row(Text(text))
        console.print(table)
    assert harmless(written.getvalue())
    if text.isprintable() and text.isascii():
        assert text in written.getvalue(), "no markup and no emoji is read from it"


def test_a_report_that_was_sent(tmp_path, capsys):
    report = {
        "name": TITLE,
        "model": C1,
        "task": TURNED,
        "notes": [TITLE, LINK],
        "hardware": {"cpu": LINK},
        "stages": [{"name": TITLE, "seconds": 1.0, "steps": 1}],
        "recipe": f"name: {LINK}\nmodel: x\n",
        "latency_ms": [{"runtime": LINK, "model": C1, "batch": 1, "length": 8, "threads": 1, "p50": 1.0, "p90": 1.0}],
    }
    metrics = [
        {"kind": "train", "stage": TITLE, "step": step, "loss": 1.0, "terms": {LINK: 1.0}, "status": {}}
        for step in (1, 2)
    ]
    write_report(report, metrics, tmp_path)
    for name in ("report.md", "report.html", "report.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert harmless(text), name
        assert "owned" in text, "the words are kept"
    assert json.loads((tmp_path / "report.json").read_text())["name"] == TITLE, "as data it is what it was"
    PlainConsole().print(terminal_table(report))
    assert harmless(capsys.readouterr().out)
