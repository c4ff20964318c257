"""The base of all that a recipe says: nothing is taken for what it is not."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Strict(BaseModel):
    """Fields of exactly their types: text is no number, true is not 1; unknown fields and infinite numbers are refused.

    A whole number may stand for a fraction's, and a list for a tuple, which YAML does not have.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, value: Any) -> Any:
        return {name: _frozen(item) for name, item in value.items()} if isinstance(value, dict) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
