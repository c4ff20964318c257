"""The pictures: they show the data, and only data there is."""

import io
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from matplotlib import rc_context
from matplotlib.image import imread

from compressft.run.report import bars, curves
from compressft.run.report.figures import FIGURE_NAMES, PLANS, STYLE, draw


def _lines(figure) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def test_every_picture_is_drawn_and_not_blank(report, metrics):
    pictures = draw(report, metrics)
    assert tuple(picture.name for picture in pictures) == FIGURE_NAMES
    for picture in pictures:
        pixels = imread(io.BytesIO(picture.png))[..., :3]
        assert (pixels < 0.9).any(axis=-1).mean() > 0.01, picture.name
        # Nothing touches the edge, so nothing was cut off.
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge > 0.99).all(), picture.name


def test_svgs_are_well_formed_with_ids_of_their_own(report, metrics):
    seen = set()
    for picture in draw(report, metrics):
        root = ElementTree.fromstring(picture.svg.replace("xlink:", ""))
        assert root.tag == "svg"
        assert "viewBox" in root.attrib
        ids = {element.get("id") for element in root.iter()} - {None}
        used = {element.get("href").removeprefix("#") for element in root.iter() if element.get("href")}
        assert used <= ids
        assert not ids & seen
        seen |= ids


@pytest.mark.parametrize("gone", FIGURE_NAMES)
def test_picture_without_data_is_left_out(report, metrics, gone):
    if gone in ("loss", "metric"):
        metrics = [row for row in metrics if row["kind"] != {"loss": "train", "metric": "eval"}[gone]]
    elif gone == "sparsity":
        metrics = [{**row, "status": None} for row in metrics]
    else:
        key = {"tradeoff": "quality", "latency": "latency_ms", "size": "size_bytes", "shapes": "shapes"}[gone]
        report[key] = None
    assert PLANS[gone].draw(report, metrics) is None


def test_nothing_to_draw():
    assert draw({}, []) == []


def test_later_rows_of_a_resumed_run_replace_earlier_ones():
    rows = [{"kind": "train", "stage": "only", "step": step, "loss": loss} for step, loss in
            ((10, 3.0), (20, 2.0), (30, 9.0), (20, 1.5), (30, 1.0), (40, 0.5))]  # fmt: skip
    assert _lines(curves.loss({}, rows))["loss"] == ([10, 20, 30, 40], [3.0, 1.5, 1.0, 0.5])


def test_loss_terms_and_stage_boundary(report, metrics):
    figure = curves.loss(report, metrics)
    assert {"total", "task", "distill.logits", "distill.hidden"} <= set(_lines(figure))
    assert any(list(line.get_xdata()) == [400, 400] for line in figure.axes[0].lines)
    assert {"teacher", "student"} <= {text.get_text().strip() for text in figure.axes[0].texts}


def test_schedule_shows_reached_planned_and_target(report, metrics):
    lines = curves.schedule(report, metrics).axes[0].lines
    last = sorted(line.get_ydata()[-1] for line in lines if len(line.get_xdata()) > 2)
    assert last == pytest.approx([0.5] * 3 + [0.75] * 3)


def test_moving_bits_get_a_panel_of_their_own(report, metrics):
    assert len(curves.schedule(report, metrics).axes) == 1
    for row in metrics:
        if row["kind"] == "train" and row["status"] and row["progress"] < 0.5:
            row["status"]["int8"]["bits"]["now"] = 32
    assert [axes.get_ylabel() for axes in curves.schedule(report, metrics).axes] == ["removed", "bits"]


def test_bars_start_at_zero(report):
    for figure in (bars.size(report, []), bars.latency(report, [])):
        assert all(axes.get_xlim()[0] == 0 for axes in figure.axes)
    widths = [[bar.get_width() for bar in axes.patches] for axes in bars.latency(report, []).axes]
    assert widths == [[6.4, 3.1, 0.62], [14.2, 9.9, 1.6], [92.5, 78.0, 12.4]]


def test_a_removed_layer_is_drawn_as_nothing_left(report):
    report["shapes"]["kept"][2] = None
    heads = bars.shapes(report, []).axes[0].patches
    assert [bar.get_height() for bar in heads[6:]] == [7, 6, 0, 5, 6, 6]


def test_better_is_up_also_where_lower_is_better(report):
    report["quality"] = {"metric": "perplexity", "split": "test", "baseline": 20.0, "torch": 21.0, "onnx": 21.1}
    low, high = bars.tradeoff(report, []).axes[0].get_ylim()
    assert low > high


def test_names_with_dollars_and_long_names_are_plain_text(report, metrics):
    for row in metrics:
        row["stage"] = "$\\frac{" + row["stage"] + "$ a very long stage name that has no room"
    assert len(draw(report, metrics)) == len(FIGURE_NAMES)


def test_global_style_is_left_alone(report, metrics):
    from matplotlib import rcParams

    before = dict(rcParams)
    draw(report, metrics)
    assert dict(rcParams) == before


def test_no_labels_overlap(report, metrics):
    with rc_context(STYLE):
        for make in (bars.tradeoff, bars.latency, bars.size, bars.shapes):
            figure = make(report, metrics)
            figure.draw_without_rendering()
            boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
            overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            assert not overlaps, make.__name__


def test_import_is_light():
    heavy = {"matplotlib", "jinja2", "torch", "numpy"}
    code = f"import sys, compressft.run.report; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
