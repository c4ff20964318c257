"""What was computed from the input seen last: the q, k and v projections of a layer read the same one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class LastInput:
    """A memo for one tensor: values live while that very object does, unchanged, and until another one comes.

    On CPU alone: comparing ranges there is free, on a GPU it would wait for the device. Compiled code shares equal
    work by itself.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._version = 0
        self._values: dict[Hashable, Any] = {}

    def value(self, x: Tensor, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave under this key for the same x."""
        if x.device.type != "cpu" or x.is_inference() or torch.compiler.is_compiling():
            return compute()
        if self._input is None or self._input() is not x or self._version != x._version:
            values: dict[Hashable, Any] = {}
            self._input = weakref.ref(x, lambda _: values.clear())
            self._version, self._values = x._version, values
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]


last_input = LastInput()
