"""Schedules: pure functions of training progress in [0, 1], so that a resumed run needs no extra state."""

import math
from collections.abc import Callable


def ramp(progress: float, start: float, end: float) -> float:
    """Fraction in [0, 1] of the way from `start` to `end`; a step at `end` where the two are equal."""
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return (progress - start) / (end - start)


def constant(fraction: float) -> float:
    """1 from the beginning of the ramp on."""
    return 1.0 if fraction > 0.0 else 0.0


def linear(fraction: float) -> float:
    """Identity."""
    return fraction


def cubic(fraction: float) -> float:
    """1 - (1 - t)^3: prune fast while much is redundant (Zhu & Gupta 2017, equation 1)."""
    return 1.0 - (1.0 - fraction) ** 3


def cosine(fraction: float) -> float:
    """Half a cosine from 0 to 1."""
    return 0.5 - 0.5 * math.cos(math.pi * fraction)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
}
