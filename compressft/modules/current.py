"""Current: what is in force inside a `with`, for the whole process."""

from __future__ import annotations

from typing import Generic, TypeVar

Value = TypeVar("Value")


class Current(Generic[Value]):
    """A value with ContextVar's methods, but not one for each thread: torch.compile reads and guards it.

    A model is not to be run by two threads that want different values.
    """

    def __init__(self, value: Value) -> None:
        self.value = value

    def get(self) -> Value:
        """The value in force."""
        return self.value

    def set(self, value: Value) -> Value:
        """Put another in force; returns what `reset` wants."""
        before, self.value = self.value, value
        return before

    def reset(self, before: Value) -> None:
        """Put the earlier one in force again."""
        self.value = before
