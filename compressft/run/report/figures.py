"""The pictures of a report: which there are, one style for all, PNG for the folder and SVG for the page.

matplotlib is imported inside functions only, so that `import compressft.run.report` stays fast.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressft.run.report import bars, curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "figure.facecolor": "white", "figure.constrained_layout.hspace": 0.12,
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": "#1f2933", "text.parse_math": False,
    "axes.facecolor": "white", "axes.edgecolor": "#9aa5b1", "axes.labelcolor": "#3e4c59", "axes.titlesize": 10,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#e4e7eb", "grid.linewidth": 0.8, "xtick.color": "#52606d", "ytick.color": "#52606d",
    "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.6,
    "svg.fonttype": "path", "svg.hashsalt": "compressft",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    caption: str
    wide: bool  # spans the page
    png: bytes
    svg: str


@dataclass(frozen=True)
class Plan:
    title: str
    caption: str
    draw: "Callable[[dict, list[dict]], Figure | None]"
    wide: bool = False


PLANS = {
    "tradeoff": Plan("Quality against latency", "Up and to the left is better.", bars.tradeoff),
    "latency": Plan("Latency", "Median per call; each panel has its own scale from zero.", bars.latency),
    "size": Plan("Size on disk", "Bytes of the files as they lie on disk.", bars.size),
    "sparsity": Plan("Compression schedule", "Solid: reached. Dashed: planned. Dotted: target.", curves.schedule),
    "metric": Plan("Quality while training", "Evaluations during the run.", curves.metric),
    "loss": Plan("Training loss", "The total, and its terms where there are several.", curves.loss),
    "shapes": Plan("What is left of each layer", "Pale: base model. Dark: kept.", bars.shapes, wide=True),
}
FIGURE_NAMES = tuple(PLANS)


def draw(report: dict, metrics: list[dict]) -> list[Picture]:
    """Every picture there is data for."""
    from matplotlib import rc_context

    pictures = []
    for name, plan in PLANS.items():
        with rc_context(STYLE):
            figure = plan.draw(report, metrics)
            if figure is not None:
                pictures.append(Picture(name, plan.title, plan.caption, plan.wide, _png(figure), _svg(figure, name)))
    return pictures


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    # Its parts have their places now; looking for them again takes longer than drawing.
    figure.set_layout_engine("none")
    return buffer.getvalue()


def _svg(figure: "Figure", name: str) -> str:
    """SVG to stand inside an HTML page: no prolog, no metadata, no namespaces, ids of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    # The card decides the width; the view box keeps the proportions.
    for size in ("width", "height"):
        text = re.sub(rf'(<svg\b[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    return text
