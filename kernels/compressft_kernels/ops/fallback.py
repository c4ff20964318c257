"""What an operator does where one of its kernels does not compile: the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from compressft_kernels import dispatch

T = TypeVar("T")


def attempt(operation: str, device: torch.device, kernel: Callable[[], T], twin: Callable[[], T]) -> T:
    """kernel(); where it, or one before it, does not compile for the device: twin(), and one line that says so.

    From then on `dispatch` sends calls to the twin at once. What comes here still are the gradients of calls before,
    and graphs that torch.compile made before.
    """
    if dispatch.failure(operation, device) is None:
        try:
            return kernel()
        except dispatch.NotCompiled as error:
            dispatch.give_up(operation, device, str(error))
    return twin()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """An operator's operands have autocast's dtype already, where it is on."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
