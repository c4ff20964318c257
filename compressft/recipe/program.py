"""The stages of a recipe: a method, objectives and passes each, which can run together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from compressft.errors import nearest
from compressft.methods import METHODS
from compressft.methods.full import Full
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.explain import explain
from compressft.recipe.parts import TrainConfig
from compressft.transform import Transform
from compressft.utils.strict import Strict


class Stage(Strict):
    """One training run: a method, any objectives, any passes."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    method: SerializeAsAny[Transform] = Field(default_factory=Full)
    objectives: tuple[SerializeAsAny[Transform], ...] = ()
    passes: tuple[SerializeAsAny[Transform], ...] = ()
    train: TrainConfig = Field(default_factory=TrainConfig)

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Transform:
        return parse_transform(value, METHODS, "method")

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives(cls, value: Any) -> tuple[Transform, ...]:
        return tuple(parse_transform(item, OBJECTIVES, "objective") for item in _listed(value))

    @field_validator("passes", mode="before")
    @classmethod
    def _passes(cls, value: Any) -> tuple[Transform, ...]:
        return tuple(parse_transform(item, PASSES, "pass") for item in _listed(value))

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """Method, objectives and passes in the order in which they act (`Transform.order`, then as written)."""
        return tuple(sorted((self.method, *self.objectives, *self.passes), key=lambda one: one.order))

    @model_validator(mode="after")
    def _compatible(self) -> Stage:
        for kind in ("objectives", "passes"):
            names = [t.type for t in getattr(self, kind)]
            double = {name for name in names if names.count(name) > 1}
            if double:
                raise ValueError(f"{kind}: {sorted(double)} given twice; keep one")
        for one in self.transforms:
            reason = one.conflict([other for other in self.transforms if other is not one])
            if reason:
                raise ValueError(reason)
        return self


def _listed(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"wants a list; got {value!r}")
    return value


def parse_transform(value: Any, registry: Mapping[str, type[Transform]], kind: str) -> Transform:
    """A Transform from its name, or from {"type": name, field: value}; ValueError where that is none."""
    if isinstance(value, Transform):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, Mapping):
        raise ValueError(f"{kind} wants a name or a mapping with `type`; got {value!r}")
    name: Any = value.get("type")
    if not isinstance(name, str) or name not in registry:
        allowed = ", ".join(sorted(registry))
        raise ValueError(f"{kind} {name!r} is not known; allowed: {allowed}{nearest(str(name), registry)}")
    try:
        return registry[name].model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(explain(error, registry[name], f"{kind} {name}")) from None
