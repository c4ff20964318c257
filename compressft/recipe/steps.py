"""Steps that are no training: selections of rows, and repeats, which are unrolled when a recipe is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compressft.errors import nearest
from compressft.utils.strict import Strict

NAME = r"^[A-Za-z0-9_-]+$"
# A hundred rounds of anything are more than one run wants.
MOST = 100


class Select(Strict):
    """Rows that finished stages choose from a pool, before a stage trains on them.

    `by` names stages (of one task), `from` a source. `type` "confident": rows that the stage gives a probability of at
    least `above`, with the label that it gives them (Lee 2013, "Pseudo-Label"); "agreed": rows to which all of the
    stages give the same label, each with at least `above` (Zhou and Li 2005, "Tri-Training"); "uncertain": the `rows`
    of highest entropy, with the labels that the pool has (Settles 2009, section 3.1). The surest, or the most
    uncertain, come first; no row is chosen twice.
    """

    name: str = Field(pattern=NAME)
    type: Literal["confident", "agreed", "uncertain"] = "confident"
    by: tuple[str, ...] = Field(min_length=1)
    pool: str
    rows: int | None = Field(default=None, ge=1)
    above: float = Field(default=0.9, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        # `from` is a word of Python's own.
        if not isinstance(value, Mapping):
            return value
        found = {"pool" if name == "from" else name: item for name, item in value.items()}
        if isinstance(found.get("by"), str):
            found["by"] = (found["by"],)
        return found

    @model_serializer(mode="wrap")
    def _written(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {"from" if name == "pool" else name: item for name, item in whole(self).items()}

    @model_validator(mode="after")
    def _fits(self) -> Select:
        if self.type == "agreed" and len(self.by) < 2:
            raise ValueError("by: agreement is of several stages; name at least two")
        if self.type != "agreed" and len(self.by) > 1:
            raise ValueError(f"by: one stage chooses what is {self.type}; name one, or take type: agreed")
        if self.type == "uncertain" and self.rows is None:
            raise ValueError("rows: is required for type: uncertain; say how many")
        return self


def unrolled(steps: object) -> object:
    """The stages of a recipe as a flat list: repeats as copies, selections as the `select` of the stage that follows.

    A copy of a stage is called NAME-2, NAME-3, ... What a copy names (`by`, `from`, `start`, `teacher`) is the last
    copy before it; `data` names all copies of a selection so far.

    Raises:
        ValueError: a repeat names no earlier step, or a selection has no stage after it.
    """
    if not isinstance(steps, list | tuple):
        return steps
    flat = _flat(steps)
    waiting: list[dict[str, object]] = []
    stages: list[object] = []
    for step in flat:
        if isinstance(step, Mapping) and _is_selection(step):
            if not isinstance(step["select"], Mapping):
                raise ValueError(f"select: wants a mapping with `type`, `by` and `from`; got {step['select']!r}")
            waiting.append({**step["select"], "name": step.get("name")})
        elif waiting and isinstance(step, Mapping):
            stages.append({**step, "select": [*waiting, *(step.get("select") or ())]})
            waiting = []
        else:
            stages.append(step)
    if waiting:
        raise ValueError(f"step {waiting[-1]['name']!r} chooses rows that no stage after it trains on; remove it")
    return tuple(stages)


def _is_selection(step: Mapping[str, object]) -> bool:
    return "select" in step and not set(step) - {"name", "select"}


def _flat(steps: Sequence[object]) -> list[object]:
    flat: list[object] = []
    count: dict[str, int] = {}
    for step in steps:
        if not (isinstance(step, Mapping) and "repeat" in step):
            flat.append(step)
            if isinstance(step, Mapping) and isinstance(step.get("name"), str):
                count[step["name"]] = 1
            continue
        times, inside = step["repeat"], step.get("stages")
        if type(times) is not int or not 1 <= times <= MOST:
            raise ValueError(f"repeat: wants a whole number from 1 to {MOST}; got {times!r}")
        if not isinstance(inside, list | tuple) or not inside or set(step) - {"repeat", "stages"}:
            raise ValueError("repeat: wants `stages`, a list of earlier steps' names or of steps, and nothing else")
        written = [_step_of(one, flat) for one in inside]
        for _ in range(times):
            for one in written:
                name = str(one["name"])
                count[name] = count.get(name, 0) + 1
                flat.append(_copy(one, count))
    return flat


def _step_of(one: object, before: Sequence[object]) -> dict[str, object]:
    if isinstance(one, Mapping) and isinstance(one.get("name"), str):
        return dict(one)
    found = {step["name"]: step for step in before if isinstance(step, Mapping) and isinstance(step.get("name"), str)}
    if not isinstance(one, str) or one not in found:
        raise ValueError(f"repeat: {one!r} is no earlier step{nearest(str(one), found)}")
    return dict(found[one])


def _copy(step: Mapping[str, object], count: Mapping[str, int]) -> dict[str, object]:
    new = copy.deepcopy(dict(step))
    own = str(new["name"])
    latest = {name: f"{name}-{number}" if number > 1 else name for name, number in count.items()}
    # What a stage names of itself is the copy before.
    latest[own] = f"{own}-{count[own] - 1}" if count[own] > 2 else own
    all_of = {
        name: [name, *(f"{name}-{k}" for k in range(2, number + 1))] for name, number in count.items() if number > 1
    }
    new["name"] = f"{own}-{count[own]}" if count[own] > 1 else own
    objectives = new.get("objectives")
    for place in (new, new.get("select"), *(objectives if isinstance(objectives, list | tuple) else ())):
        if not isinstance(place, dict):
            continue
        for field in ("by", "start", "teacher"):
            named = place.get(field)
            if isinstance(named, str):
                place[field] = latest.get(named, named)
            elif isinstance(named, list | tuple):
                place[field] = [latest.get(name, name) for name in named]
    data = new.get("data")
    if isinstance(data, list | tuple):
        new["data"] = [name for one in data for name in all_of.get(one, [one])]
    return new
