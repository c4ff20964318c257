"""The stages of a recipe: a method, objectives and passes each, which can run together, and what they train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from compressft.errors import nearest
from compressft.methods import METHODS
from compressft.methods.full import Full
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.conflict import conflict
from compressft.recipe.explain import explain
from compressft.recipe.parts import TrainConfig
from compressft.recipe.steps import NAME, Select
from compressft.tasks import TASKS
from compressft.tasks.task import TaskSettings
from compressft.transform import Transform
from compressft.utils.strict import Strict

Member = TypeVar("Member", bound=Strict)


class FeedConfig(Strict):
    """One of a stage's several feeds: a task and a source, the recipe's where they are not given.

    `share` is the fraction of the stage's steps that are its; feeds without one divide the rest by their rows.
    """

    task: SerializeAsAny[TaskSettings] | None = None
    data: str | None = None
    share: float | None = Field(default=None, gt=0, lt=1)

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: object) -> TaskSettings | None:
        return None if value is None else parse_task(value)


# Fields of a stage that were not there before stages had their own task and rows.
LATER = {"task": None, "data": None, "feeds": [], "temperature": 1.0, "select": [], "start": None}


class Stage(Strict):
    """One training run: a method, any objectives, any passes.

    `task` and `data` (a source's name) are the recipe's where they are not given. `feeds` are several of both: each
    step takes a batch of one of them, and the first one's validation rows are the stage's, its head the one that goes
    on. Feeds without a `share` divide the steps by rows ** (1 / `temperature`).

    `select` are selections made before the stage begins; `data` may be a list of a source and selections, whose rows
    join the training rows. A stage goes on from the one before it, or from the one that `start` names ("base": the
    recipe's model).
    """

    name: str = Field(pattern=NAME)
    task: SerializeAsAny[TaskSettings] | None = None
    data: str | tuple[str, ...] | None = None
    feeds: tuple[FeedConfig, ...] = ()
    temperature: float = Field(default=1.0, gt=0)
    select: tuple[Select, ...] = ()
    start: str | None = None
    method: SerializeAsAny[Transform] = Field(default_factory=Full)
    objectives: tuple[SerializeAsAny[Transform], ...] = ()
    passes: tuple[SerializeAsAny[Transform], ...] = ()
    train: TrainConfig = Field(default_factory=TrainConfig)

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: object) -> TaskSettings | None:
        return None if value is None else parse_task(value)

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: object) -> Transform:
        return parse_member(value, METHODS, "method")

    @field_validator("objectives", mode="before")
    @classmethod
    def _objectives(cls, value: object) -> tuple[Transform, ...]:
        return tuple(parse_member(item, OBJECTIVES, "objective") for item in listed(value))

    @field_validator("passes", mode="before")
    @classmethod
    def _passes(cls, value: object) -> tuple[Transform, ...]:
        return tuple(parse_member(item, PASSES, "pass") for item in listed(value))

    @model_serializer(mode="wrap")
    def _written(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        # A recipe of one task is written, and hashed, as before stages could have their own.
        return {
            name: value
            for name, value in whole(self).items()
            if name not in LATER or (list(value) if isinstance(value, tuple) else value) != LATER[name]
        }

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
        if isinstance(self.data, tuple) and not self.data:
            raise ValueError("data: names nothing; name a source, or leave it out")
        if self.feeds and (self.task is not None or self.data is not None):
            raise ValueError("feeds: each has its own task and data; remove the stage's, or its feeds")
        if len(self.feeds) == 1:
            raise ValueError("feeds: one feed is the stage's task and data; write them so")
        reason = next(filter(None, (one.check() for one in self.transforms)), None) or conflict(self.transforms)
        if reason:
            raise ValueError(reason)
        return self


def listed(value: object) -> Sequence[object]:
    """A list of a recipe; nothing is an empty one. ValueError where it is something else."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ValueError(f"wants a list; got {value!r}")
    return value


def parse_task(value: object) -> TaskSettings:
    """A task from its name, or from {"type": name, field: value}; ValueError where that is none."""
    return parse_member(value, {name: task.settings_class for name, task in TASKS.items()}, "task")


def parse_member(value: object, registry: Mapping[str, type[Member]], kind: str) -> Member:
    """One of a registry's from its name, or from {"type": name, field: value}; ValueError where that is none."""
    if isinstance(value, Strict):
        return value  # type: ignore[return-value]
    name = _type_of(value, registry, kind)
    try:
        return registry[name].model_validate(dict(value) if isinstance(value, Mapping) else {"type": name})
    except ValidationError as error:
        raise ValueError(explain(error, registry[name], f"{kind} {name}")) from None


def _type_of(value: object, registry: Mapping[str, object], kind: str) -> str:
    if not isinstance(value, str | Mapping):
        raise ValueError(f"{kind} wants a name or a mapping with `type`; got {value!r}")
    name = value if isinstance(value, str) else value.get("type")
    if not isinstance(name, str) or name not in registry:
        allowed = ", ".join(sorted(registry))
        raise ValueError(f"{kind} {name!r} is not known; allowed: {allowed}{nearest(str(name), registry)}")
    return name
