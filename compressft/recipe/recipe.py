"""Recipes: one YAML file says what is trained, what gets smaller and what is exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from compressft.data.source import DataConfig, is_named
from compressft.errors import UserError, nearest
from compressft.evaluation.analyses import ANALYSES
from compressft.evaluation.analyses.analysis import Analysis
from compressft.recipe.document import override_all, read_document
from compressft.recipe.explain import explain
from compressft.recipe.parts import EVALUATION_BATCH, ExportConfig
from compressft.recipe.program import Stage, listed, parse_member, parse_task
from compressft.recipe.steps import Select, unrolled
from compressft.tasks import TASKS
from compressft.tasks.task import TaskSettings
from compressft.utils.files import document_hash
from compressft.utils.strict import Strict
from compressft.utils.strict_yaml import write_yaml

Sources = dict[str, DataConfig]


@dataclass(frozen=True)
class Feed:
    """What a stage trains on: a task bound to a source of rows; `source` is its name, "" where it has none.

    `more` are selections whose rows join its training rows.
    """

    task: TaskSettings
    source: str
    data: DataConfig
    more: tuple[str, ...] = ()

    @property
    def origin(self) -> tuple[TaskSettings, str]:
        """Task and source: what feeds have in common, whatever selections join them."""
        return self.task, self.source

    @property
    def field(self) -> str:
        """The recipe's field that describes the source."""
        return f"data.{self.source}" if self.source else "data"


class Recipe(Strict):
    """A whole run. Its `name` is also a folder's, below `runs/`: letters, digits and `. _ -` or blanks between them.

    `model` is a shipped name, a folder or a hub id; "owner/name@v1.0" is a branch, tag or commit of it. So are the
    teachers and data sets that come from the hub.

    `data` is one source of rows, or several by name, of which every stage names one. `task` is every stage's own where
    it does not say another. What ships is the last stage's.

    `delta/` holds what differs from `model`, or from the model of an earlier stage where `delta_from` names one.
    `report_to` are trackers that follow the training, each with a package of its own (extra `track`).
    """

    name: str = Field(pattern=r"^\w([\w. -]{0,98}\w)?$")
    description: str = ""
    model: str
    task: SerializeAsAny[TaskSettings] = Field(default_factory=lambda: parse_task("sequence-classification"))
    data: DataConfig | Sources
    stages: tuple[Stage, ...] = Field(min_length=1)
    export: ExportConfig = Field(default_factory=ExportConfig)
    analyses: tuple[SerializeAsAny[Analysis], ...] = ()
    report_to: tuple[Literal["wandb", "tensorboard", "mlflow", "trackio"], ...] = ()
    delta_from: str | None = None
    smoke: bool = False

    @field_validator("task", mode="before")
    @classmethod
    def _task(cls, value: object) -> TaskSettings:
        return parse_task(value)

    @field_validator("stages", mode="before")
    @classmethod
    def _flat(cls, value: object) -> object:
        return unrolled(value)

    @field_validator("data", mode="plain", json_schema_input_type=DataConfig | Sources)
    @classmethod
    def _data(cls, value: object) -> DataConfig | Sources:
        # A union would report what is wrong of both forms.
        return TypeAdapter(Sources if is_named(value) else DataConfig).validate_python(value)

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("analyses", mode="before")
    @classmethod
    def _analyses(cls, value: object) -> tuple[Analysis, ...]:
        return tuple(parse_member(item, ANALYSES, "analysis") for item in listed(value))

    @model_serializer(mode="wrap")
    def _without_none(self, whole: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Without these a recipe is written, and hashed, as before there were any.
        return {name: value for name, value in whole(self).items() if value or name not in ("analyses", "report_to")}

    @field_serializer("data")
    def _written(self, data: DataConfig | Sources) -> dict[str, object]:
        # A union's serialiser would warn about whichever form it is not.
        if isinstance(data, DataConfig):
            return data.model_dump(mode="json")
        return {name: source.model_dump(mode="json") for name, source in data.items()}

    @model_validator(mode="after")
    def _feeds(self) -> Recipe:
        made: list[str] = []
        for position, stage in enumerate(self.stages):
            where = f"stages.{position}"
            for one in stage.select:
                self._refuse_selection(one, [*made], position)
                made.append(one.name)
            for number, one in enumerate(stage.feeds or (stage,)):
                first, *more = (one.data,) if not isinstance(one.data, tuple) else one.data
                self._refuse_source(first, where + (f".feeds.{number}" if stage.feeds else ""))
                for name in more:
                    if name not in made:
                        known = ", ".join(made) or "none"
                        raise ValueError(f"{where}.data: {name!r} is no selection made before; made: {known}")
        used = [feed for stage in self.stages for feed in self.feeds(stage)]
        pools = {one.pool for stage in self.stages for one in stage.select}
        for name in self.sources:
            if all(feed.source != name for feed in used) and name not in pools:
                raise ValueError(f"data.{name}: no stage trains on it; name it in a stage's data, or remove it")
        for feed in used:
            self._refuse_unlabelled(feed)
        for position, stage in enumerate(self.stages):
            self._refuse_endless(stage, f"stages.{position}")
        return self

    def _refuse_endless(self, stage: Stage, where: str) -> None:
        """Refuse what nobody can know of a stream: its end, and a share of it."""
        streamed = [feed for feed in self.feeds(stage) if feed.data.streaming]
        if streamed and len(self.feeds(stage)) > 1:
            raise ValueError(f"{where}.feeds: {streamed[0].field} is streamed, and has no share; remove its streaming")
        if streamed and stage.train.max_steps <= 0:
            raise ValueError(f"{where}.train.max_steps: is required, as {streamed[0].field} is streamed and has no end")

    def _refuse_selection(self, select: Select, made: Sequence[str], position: int) -> None:
        """Refuse a selection before stage `position`, of what is not there yet or cannot choose."""
        where, sources = f"step {select.name!r}", self.sources
        stages = {stage.name: stage for stage in self.stages[:position]}
        if select.name in made or select.name in {stage.name for stage in self.stages} or select.name in sources:
            raise ValueError(f"{where}: the name is taken; give it another")
        if select.pool not in sources:
            known = ", ".join(name for name in sources if name) or "none: the only one has no name"
            raise ValueError(f"{where}: from {select.pool!r} is no source; named: {known}")
        for name in select.by:
            if name not in stages:
                known = ", ".join(stages) or "none"
                raise ValueError(f"{where}: by {name!r} is no stage before it; before: {known}{nearest(name, stages)}")
        feeds = [self.feed(stages[name]) for name in select.by]
        if any(feed.task != feeds[0].task for feed in feeds) or not TASKS[feeds[0].task.type].chooses:
            able = " and ".join(name for name, task in TASKS.items() if task.chooses)
            raise ValueError(f"{where}: its stages must have one task, of {able}")

    def _refuse_source(self, name: str | None, where: str) -> None:
        sources = self.sources
        if name is None and len(sources) > 1:
            known = ", ".join(sources)
            raise ValueError(f"{where}.data: is required, as there are several sources; name one of {known}")
        if name is not None and name not in sources:
            known = ", ".join(name for name in sources if name) or "none: the only one has no name"
            raise ValueError(f"{where}.data: {name!r} is no source; named: {known}{nearest(name, sources)}")

    def _refuse_unlabelled(self, feed: Feed) -> None:
        asked = [name for name in ("unlabelled", "augment") if getattr(feed.data, name) is not None]
        if asked and not TASKS[feed.task.type].teachable:
            able = " and ".join(name for name, task in TASKS.items() if task.teachable)
            raise ValueError(f"{feed.field}.{asked[0]}: rows without labels are for {able}; remove it")
        of_it = [stage for stage in self.stages if self.feed(stage).source == feed.source]
        if asked and not any(objective.answers for stage in of_it for objective in stage.objectives):
            raise ValueError(
                f"{feed.field}.{asked[0]}: rows without labels need a teacher; add objective distill or remove it"
            )

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stages: names must differ; got {names}")
        for taken in ("self", "base"):
            if taken in names:
                raise ValueError(f"stages: the name {taken!r} is taken by the distillation teacher")
        if self.delta_from is not None and self.delta_from not in names[:-1]:
            earlier = f"one of {', '.join(names[:-1])}" if names[:-1] else "nothing, there is none"
            raise ValueError(f"delta_from: {self.delta_from!r} is no earlier stage; name {earlier}")
        for position, stage in enumerate(self.stages):
            if stage.start not in (None, "base", *names[:position]):
                raise ValueError(
                    f"stages.{position}.start: {stage.start!r} is neither base nor an earlier stage; "
                    f"earlier: {', '.join(names[:position]) or 'none'}"
                )
            for objective in stage.objectives:
                teacher = getattr(objective, "teacher", None)
                if teacher in names[position:]:
                    raise ValueError(
                        f"stages.{position}: objective {objective.type!r} takes stage {teacher!r} as its teacher, "
                        "which has not run by then; name an earlier stage"
                    )
                if teacher in names and self.feed(self.stages[names.index(teacher)]).origin != self.feed(stage).origin:
                    raise ValueError(
                        f"stages.{position}: objective {objective.type!r} takes stage {teacher!r} as its teacher, "
                        "which has another task or other data; name one of the same"
                    )
        for position, analysis in enumerate(self.analyses):
            reason = analysis.refuse()
            if reason is not None:
                raise ValueError(f"analyses.{position}: {reason}")
        return self

    @property
    def sources(self) -> Sources:
        """The sources of rows by name; one without a name is ""."""
        return {"": self.data} if isinstance(self.data, DataConfig) else self.data

    def feeds(self, stage: Stage) -> tuple[Feed, ...]:
        """What a stage trains on, one feed or several; the first is the one that it is validated on."""
        sources = self.sources
        chosen = [(one.task, one.data) for one in stage.feeds] or [(stage.task, stage.data)]
        found = []
        for task, named in chosen:
            names = (named,) if isinstance(named, str) else named or (next(iter(sources)),)
            found.append(Feed(task or self.task, names[0], sources[names[0]], names[1:]))
        return tuple(found)

    def feed(self, stage: Stage) -> Feed:
        """The first of a stage's feeds."""
        return self.feeds(stage)[0]

    @property
    def shipped(self) -> Feed:
        """What the last stage trains on: the model that ships is for it."""
        return self.feed(self.stages[-1])

    @property
    def evaluation_batch(self) -> int:
        """Rows at a time where a model is evaluated outside of training."""
        return min(EVALUATION_BATCH, self.stages[-1].train.eval_batch_size)

    def to_yaml(self) -> str:
        """The fully resolved recipe."""
        return write_yaml(json.loads(self.model_dump_json()))

    @property
    def hash(self) -> str:
        """Content hash, "sha256:..."; equal recipes have equal hashes."""
        return document_hash(json.loads(self.model_dump_json()))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by shipped name or YAML path, follow `extends:`, apply `a.b=c` overrides, validate.

    Overrides take YAML values; list items are addressed by position or, for stages, by name
    (`stages.student.train.epochs=2`).

    Raises:
        UserError: file, field or value is wrong; the message has the path, the value and what is allowed.
    """
    document = read_document(source)
    override_all(document, overrides)
    return parse_recipe(document, str(source))


def parse_recipe(document: Mapping[str, object], where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Recipe, '')}") from None


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe on a few rows: every step of the run; tolerances do not apply to noise."""
    document = json.loads(recipe.model_dump_json())
    document["smoke"] = True
    for name, source in recipe.sources.items():
        few = {"limit": min(96, source.limit or 96), "max_length": min(32, source.max_length)}
        (document["data"][name] if name else document["data"]).update(few)
    for stage in document["stages"]:
        stage["train"] |= {"epochs": 1, "max_steps": 4, "batch_size": min(8, stage["train"]["batch_size"])}
    document["export"] |= {"latency_rounds": 1, "latency_shapes": [[1, 32]]}
    return parse_recipe(document)
