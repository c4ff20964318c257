"""The base of all that a recipe says: nothing is taken for what it is not."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

# What 32 bits hold, a seed's too: nothing here is counted further.
LARGEST = 2**32 - 1
Value = TypeVar("Value")


class Strict(BaseModel):
    """Fields of exactly their types: text is no number, true is not 1; unknown fields and infinite numbers are refused.

    A whole number may stand for a fraction's, and a list for a tuple, which YAML does not have. Whole numbers beyond
    `LARGEST`, which no library counts to, are refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, value: object) -> object:
        return {name: _frozen(item) for name, item in value.items()} if isinstance(value, dict) else value

    @field_validator("*", mode="before")
    @classmethod
    def _within(cls, value: Value) -> Value:
        _refuse_beyond(value)
        return value


def _refuse_beyond(value: object) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _refuse_beyond(item)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"wants a whole number of at most {LARGEST:,}; got one of {value.bit_length()} bits")


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
