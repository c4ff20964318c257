"""How figures are written: scores, differences, bytes, counts, milliseconds, durations. One rule per kind of figure."""

import math
import re
from numbers import Real
from typing import TypeGuard

MISSING = "not measured"
NOTHING = "\N{EN DASH}"  # a table cell that has no meaning here
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

# A metric is recognised by any word of its name ("macro_f1", "eval_accuracy"). An unknown one is shown as it is:
# printing a BLEU of 30 as 3000% would be worse than printing an unknown fraction without its percent sign.
_FRACTIONS = {"accuracy", "acc", "f1", "precision", "recall", "exact", "em", "auc", "auroc", "agreement", "ece", "wer"}
_LOWER_IS_BETTER = {"perplexity", "ppl", "mse", "rmse", "mae", "loss", "nll", "error", "ece", "brier", "wer", "cer"}


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite real number; None, bool, text, NaN and infinities are not measurements."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_fraction(metric: str | None) -> bool:
    return not _FRACTIONS.isdisjoint(_words(metric))


def lower_is_better(metric: str | None) -> bool:
    return not _LOWER_IS_BETTER.isdisjoint(_words(metric))


def metric_title(metric: str | None) -> str:
    return str(metric or "metric").replace("_", " ")


def score(metric: str | None, value: object) -> str:
    """0.917 of accuracy is "91.70%", 12.31 of perplexity is "12.310"."""
    if not is_number(value):
        return MISSING
    return percent(value) if is_fraction(metric) else _signed(f"{value:.3f}")


def score_difference(metric: str | None, value: object) -> str:
    """A difference of two scores with its sign; fractions in percentage points."""
    if not is_number(value):
        return MISSING
    text = f"{value * 100:+.2f}" if is_fraction(metric) else f"{value:+.3f}"
    if not float(text):
        text = text[1:]
    return _signed(text) + (" points" if is_fraction(metric) else "")


def percent(value: object) -> str:
    """0.998 is "99.80%". What is not quite everything never reads as 100%."""
    if not is_number(value):
        return MISSING
    text = f"{value * 100:.2f}%"
    return ">99.99%" if text == "100.00%" and value < 1 else _signed(text)


def change(value: object) -> str:
    """A relative change with its sign: -0.825 is "−82.5%"."""
    if not is_number(value):
        return MISSING
    text = f"{value * 100:+.1f}"
    return (_signed(text) if float(text) else text[1:]) + "%"


def ratio(value: object) -> str:
    """6.1875 is "6.19×"; from 10 on one decimal is enough."""
    if not is_number(value):
        return MISSING
    return f"{value:.1f}{TIMES}" if value >= 9.995 else f"{value:.2f}{TIMES}"


def size(value: object) -> str:
    """Bytes in decimal units, as file managers and the Hub show them."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value: object) -> str:
    """A number of things: 22713986 is "22.7 M"."""
    return _scaled(value, ("", "k", "M", "G", "T"))


def milliseconds(value: object) -> str:
    if not is_number(value):
        return MISSING
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} ms"


def duration(value: object) -> str:
    """Seconds as "8.2 s", "4 min 0 s" or "1 h 30 min"."""
    if not is_number(value):
        return MISSING
    if value < 59.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def rate(value: object, unit: str) -> str:
    if not is_number(value):
        return MISSING
    return f"{value:,.0f} {unit}/s" if value >= 100 else f"{value:.1f} {unit}/s"


def error(value: object) -> str:
    """A numerical error, three significant digits."""
    return f"{value:.3g}" if is_number(value) else MISSING


def whole(value: object) -> str:
    return f"{value:,}" if is_number(value) else MISSING


def shape(batch: object, length: object) -> str:
    return f"{batch}{TIMES}{length}"


def _words(metric: str | None) -> list[str]:
    return re.split(r"[^a-z0-9]+", str(metric or "").lower())


def _signed(text: str) -> str:
    return text.replace("-", MINUS)


def _scaled(value: object, units: tuple[str, ...]) -> str:
    if not is_number(value):
        return MISSING
    power = 0
    while power < len(units) - 1 and round(value / 1000**power, 1) >= 1000:
        power += 1
    if power == 0:
        return f"{value:g} {units[0]}".strip()
    return f"{value / 1000**power:.1f} {units[power]}"


def cell(value: object) -> str:
    """A table's value: text as it is, whole numbers grouped, others to four digits."""
    if value is None:
        return NOTHING
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
