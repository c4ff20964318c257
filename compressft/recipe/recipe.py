"""Recipes: one YAML file says what is trained, what gets smaller and what is exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from compressft.data.source import DataConfig
from compressft.errors import UserError
from compressft.recipe.document import override_all, read_document
from compressft.recipe.explain import explain
from compressft.recipe.parts import EVALUATION_BATCH, ExportConfig
from compressft.recipe.program import Stage
from compressft.utils.files import document_hash
from compressft.utils.strict import Strict
from compressft.utils.strict_yaml import write_yaml

TaskType = Literal["sequence-classification", "regression", "token-classification", "causal-lm"]


# Tasks whose rows may lack a label while a teacher answers.
TEACHABLE = ("sequence-classification", "token-classification")


class Recipe(Strict):
    """A whole run. Its `name` is also a folder's, below `runs/`: letters, digits and `. _ -` or blanks between them.

    `delta/` holds what differs from `model`, or from the model of an earlier stage where `delta_from` names one.
    """

    name: str = Field(pattern=r"^\w([\w. -]{0,98}\w)?$")
    description: str = ""
    model: str
    task: TaskType = "sequence-classification"
    data: DataConfig
    stages: tuple[Stage, ...] = Field(min_length=1)
    export: ExportConfig = Field(default_factory=ExportConfig)
    delta_from: str | None = None
    smoke: bool = False

    @model_validator(mode="after")
    def _stages(self) -> Recipe:
        asked = [name for name in ("unlabelled", "augment") if getattr(self.data, name) is not None]
        if asked and self.task not in TEACHABLE:
            raise ValueError(f"data.{asked[0]}: rows without labels are for {' and '.join(TEACHABLE)}; remove it")
        if asked and not any(objective.answers for stage in self.stages for objective in stage.objectives):
            raise ValueError(f"data.{asked[0]}: rows without labels need a teacher; add objective distill or remove it")
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
            for objective in stage.objectives:
                teacher = getattr(objective, "teacher", None)
                if teacher in names[position:]:
                    raise ValueError(
                        f"stages.{position}: objective {objective.type!r} takes stage {teacher!r} as its teacher, "
                        "which has not run by then; name an earlier stage"
                    )
        return self

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


def parse_recipe(document: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Recipe, '')}") from None


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe on a few rows: every step of the run, in under a minute; tolerances do not apply to noise."""
    document = json.loads(recipe.model_dump_json())
    document["smoke"] = True
    document["data"] |= {"limit": min(96, recipe.data.limit or 96), "max_length": min(32, recipe.data.max_length)}
    for stage in document["stages"]:
        stage["train"] |= {"epochs": 1, "max_steps": 4, "batch_size": min(8, stage["train"]["batch_size"])}
    document["export"] |= {"latency_rounds": 1, "latency_shapes": [[1, 32]]}
    return parse_recipe(document)
