"""More and more goes between two points of training."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import Field

from compressft.transform import SHAPES, ramp

Start = Annotated[float, Field(ge=0, lt=1)]
End = Annotated[float, Field(gt=0, le=1)]
Schedule = Literal["cubic", "linear", "cosine", "constant"]


class Gradual(Protocol):
    """A pass that follows a schedule.

    Fields: nothing is pruned up to progress `start`; the full extent is reached at `end`, along `schedule`.
    """

    @property
    def type(self) -> str: ...

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...

    @property
    def schedule(self) -> Schedule: ...


def planned(one: Gradual, progress: float) -> float:
    """Fraction in [0, 1] of the full extent that a pass's schedule asks for."""
    return SHAPES[one.schedule](ramp(progress, one.start, one.end))


def check_span(one: Gradual) -> str | None:
    """Why a pass's schedule has no room, or None."""
    if one.end <= one.start:
        return f"pass {one.type}.end: {one.end} is not after {one.type}.start {one.start}"
    return None
