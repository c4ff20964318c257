"""Every kernel is launched through here, so that the same launchers also compile for a GPU that is not there."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from compressft_kernels.dispatch import NotCompiled

# Called with (kernel, grid, arguments, options) instead of launching.
Handler = Callable[[Any, tuple[int, ...], tuple[object, ...], dict[str, object]], None]
_handler: ContextVar[Handler | None] = ContextVar("compressft_launch_handler", default=None)


@contextmanager
def intercepting(handler: Handler) -> Iterator[None]:
    """Inside, launches go to `handler` and nothing runs: tensors may be without memory."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    """kernel[grid](*args, **options) on the device of its first tensor; nothing for an empty grid.

    Raises:
        NotCompiled: triton cannot compile it for that device.
    """
    if 0 in grid:
        return
    handler = _handler.get()
    if handler is not None:
        handler(kernel, grid, args, options)
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    try:
        with torch.cuda.device(device) if elsewhere else nullcontext():
            kernel[grid](*args, **options)
    except Exception as error:
        if not _of_the_compiler(error):
            raise
        raise NotCompiled(f"{kernel.fn.__name__} does not compile there ({_brief(error)})") from error


def _of_the_compiler(error: Exception) -> bool:
    """Whether it was raised while a kernel or its launcher was compiled, not by the launch or a fault of the device."""
    from triton.runtime.errors import OutOfResources

    # A failed pass raises a RuntimeError, as CUDA does: only where it comes from tells them apart.
    frames = [(f.f_globals.get("__name__"), f.f_code.co_name) for f, _ in traceback.walk_tb(error.__traceback__)]
    compiled = any(frame == ("triton.compiler.compiler", "compile") for frame in frames)
    return compiled or any(name == "triton.runtime.build" for name, _ in frames) or isinstance(error, OutOfResources)


def _brief(error: Exception) -> str:
    """Its name and the line of its message that says most: after a place in the source, the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1] if lines[0].startswith('at ') else lines[0]}"[:160]


def cdiv(length: int, block: int) -> int:
    """How many blocks cover a length."""
    return -(-length // block)
