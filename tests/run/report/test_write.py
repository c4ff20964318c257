"""The report folder: complete, atomic, honest about what is missing, safe with foreign strings, self-contained."""
# ruff: noqa: RUF001 (the report prints true minus and multiplication signs)

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from compressft.run.report import numbers, write_report
from compressft.run.report.figures import FIGURE_NAMES


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def _write(report, metrics, folder):
    write_report(report, metrics, folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_files_and_contents(report, metrics, tmp_path):
    before = copy.deepcopy(report)
    html, markdown = _write(report, metrics, tmp_path / "run" / "report")
    folder = tmp_path / "run" / "report"
    names = {"report.json", "report.md", "report.html", *(f"{name}.png" for name in FIGURE_NAMES)}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "report.json").read_text()) == before == report
    for text in (html, markdown):
        for figure in ("91.70%", "92.10%", "−0.40 points", "6.19×", "16.0 MB", "91.6 MB", "−82.5%", "99.80%",
                       "1.60 ms", "2.3 GB", "5 min 0 s", "66.67%"):  # fmt: skip
            assert figure in text, figure
    assert html.count("<svg") == len(FIGURE_NAMES)
    assert numbers.MISSING not in html + markdown


def test_page_needs_nothing_from_outside(report, metrics, tmp_path):
    html, _ = _write(report, metrics, tmp_path)
    page = _Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "http" not in html
    assert "@import" not in html
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_foreign_strings_stay_text(report, metrics, tmp_path):
    evil = "<script>alert('x')</script>&\"|`"
    report |= {"name": evil, "model": evil, "task": evil, "recipe": f"a: {evil}\n</pre>{evil}", "notes": [evil],
               "recipe_hash": evil, "versions": {evil: evil}, "hardware": {"cpu": evil, evil: evil}}  # fmt: skip
    report["quality"] |= {"metric": f"accuracy {evil}", "split": evil}
    report["stages"][0] |= {"name": evil, "validation": {evil: 0.5}, "best": evil}
    report["latency_ms"][0]["runtime"] = evil
    report["verification"][0]["split"] = evil
    report["shapes"]["base"][0] = {evil: 3}
    for row in metrics:
        row["stage"] = evil
        if row["kind"] == "train":
            row["terms"] = {evil: 1.0, "other": 2.0}
        else:
            row["metrics"] = {f"accuracy {evil}": 0.9}
    html, markdown = _write(report, metrics, tmp_path)
    page = _Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert not any(value and "alert" in value for name, value in page.attributes if name.startswith("on"))
    assert evil in "".join(page.text)
    assert "<script" not in markdown
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| validation")}
    assert columns == {9}


MINIMAL = {
    "quality": {"metric": "accuracy", "split": "test", "baseline": None, "torch": 0.9, "onnx": None},
    "parity": {"split": None, "max_abs_error": None, "label_agreement": None},
    "size_bytes": {"base_onnx": None, "onnx": None, "model": 5, "delta": None},
    "parameters": {"base": 10, "total": 10, "trainable": 1, "nonzero": 10},
    "latency_ms": [],
    "training": {"seconds": 3.0, "examples_per_second": 1.0, "tokens_per_second": None, "peak_memory_bytes": None},
    "versions": {}, "hardware": {}, "recipe_hash": None,
}  # fmt: skip


@pytest.mark.parametrize("report", [MINIMAL, dict.fromkeys(MINIMAL), {}], ids=["no export", "all null", "empty"])
def test_what_is_missing_reads_not_measured(report, tmp_path):
    html, markdown = _write(report, [], tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for text in (html, markdown):
        assert numbers.MISSING in text
        assert "None" not in text
        assert "nan" not in text
    assert "onnxruntime.InferenceSession" not in markdown
    if report is MINIMAL:
        assert "90.00%" in html
        assert "no baseline in this run" in html


@pytest.fixture
def text_alone(monkeypatch):
    """Pictures take seconds, and say nothing in words."""
    monkeypatch.setattr("compressft.run.report.figures.draw", lambda report, metrics: [])


@pytest.mark.usefixtures("text_alone")
def test_each_contract_value_may_be_null_alone(report, tmp_path):
    for section in ("quality", "parity", "size_bytes", "parameters", "training", "hardware"):
        for key in report[section]:
            partial = copy.deepcopy(report)
            partial[section][key] = None
            html, markdown = _write(partial, [], tmp_path)
            assert "None" not in html + markdown.replace("session.run(None", ""), (section, key)


@pytest.mark.usefixtures("text_alone")
def test_regression_has_no_label_agreement(report, metrics, tmp_path):
    report["task"] = "regression"
    report["quality"] = {"metric": "pearson", "split": "test", "baseline": 0.9, "torch": 0.88, "onnx": 0.879}
    report["parity"]["label_agreement"] = None
    for row in report["verification"]:
        row["label_agreement"] = None
    html, markdown = _write(report, metrics, tmp_path)
    assert "0.879" in html
    assert "−0.021" in html
    assert "Same label, torch and ONNX" not in html
    assert "argmax" not in markdown


@pytest.mark.usefixtures("text_alone")
def test_not_finite_figures_become_null_and_are_said(report, metrics, tmp_path):
    report["parity"]["max_abs_error"] = float("nan")
    report["latency_ms"][0]["p50"] = float("inf")
    html, markdown = _write(report, metrics, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert written["parity"]["max_abs_error"] is None
    assert written["notes"][-2:] == [
        "parity.max_abs_error came out as nan; it is recorded as null.",
        "latency_ms[0].p50 came out as inf; it is recorded as null.",
    ]
    assert "came out as nan" in html
    assert "came out as nan" in markdown


def test_second_report_replaces_the_first(report, metrics, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"kept")
    _write(report, metrics, tmp_path)
    _write({**report, "shapes": None}, [], tmp_path)
    left = {path.name for path in tmp_path.glob("*.png")}
    assert left == {"tradeoff.png", "latency.png", "size.png", "mine.png"}


@pytest.mark.usefixtures("text_alone")
def test_failure_leaves_the_earlier_report_whole(report, metrics, tmp_path, monkeypatch):
    _write(report, metrics, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        write_report({**report, "versions": {"torch": object()}}, metrics, tmp_path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(report, metrics, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("text_alone")
def test_usage_code_in_the_card_is_valid_python(report, metrics, tmp_path):
    _, markdown = _write(report, metrics, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", markdown, flags=re.DOTALL)
    compile(code, "card", "exec")
    assert 'InferenceSession("onnx/model.onnx"' in code
    assert "argmax" in code
