"""Every kernel is launched through here, so that the same launchers also compile for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# Called with (kernel, grid, arguments, options) instead of launching.
Handler = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]
_handler: ContextVar[Handler | None] = ContextVar("compressft_launch_handler", default=None)


@contextmanager
def intercepting(handler: Handler) -> Iterator[None]:
    """Inside, launches go to `handler` and nothing runs: tensors may be without memory."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options) on the device of its first tensor; nothing for an empty grid."""
    if 0 in grid:
        return
    handler = _handler.get()
    if handler is not None:
        handler(kernel, grid, args, options)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def cdiv(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)
