"""Python's garbage collector goes through a million objects that imports leave; here it is told when not to."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside, nothing is collected: imports make no garbage worth looking for, and take a sixth less time so."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_quickly() -> None:
    """A process of ours collects nothing when it ends, which otherwise takes it two to five seconds."""
    atexit.register(gc.freeze)
