"""Recipes: one YAML file says what is trained, what gets smaller and what is exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from compressft.document import SOURCES, document_hash, override_all, read_document
from compressft.errors import UserError, nearest
from compressft.methods import METHODS
from compressft.methods.full import Full
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.strict import Strict
from compressft.strict_yaml import write_yaml
from compressft.transform import Transform

TaskType = Literal["sequence-classification", "regression", "token-classification", "causal-lm"]


# Rows at a time outside of training, where a stage's eval_batch_size does not want fewer.
EVALUATION_BATCH = 32
# Tasks whose rows may lack a label while a teacher answers.
TEACHABLE = ("sequence-classification", "token-classification")


class AugmentConfig(Strict):
    """Rewritten copies of the training rows, without labels (`data/augment.py`): how many per row, and how.

    `mask`, `replace` and `drop` are probabilities per word, `crop` is one per copy.
    """

    copies: float = Field(default=4.0, gt=0)
    mask: float = Field(default=0.1, ge=0, le=1)
    replace: float = Field(default=0.1, ge=0, le=1)
    drop: float = Field(default=0.05, ge=0, le=1)
    crop: float = Field(default=0.25, ge=0, le=1)

    @model_validator(mode="after")
    def _one_fate(self) -> AugmentConfig:
        if self.mask + self.replace + self.drop >= 1:
            raise ValueError("mask, replace and drop together leave no word as it was; their sum must be below 1")
        return self


class DataConfig(Strict):
    """Where the rows come from. Give `sample` (shipped), `train` (a file or several) or `dataset` (a hub id, with
    the `subset` it may want, such as "sst2" of "glue").

    Without a validation split, the fraction `validation_fraction` of train is carved out, stratified by label and
    seeded. `per_class` keeps a balanced sample of the training rows; `limit` the first rows after shuffling.
    `columns` maps the task's fields (text, text_b, label, score, tokens, tags) to column names.

    Rows without labels train through distillation alone: those of `unlabelled` (a file or several), and rewritten
    copies of the training rows (`augment`). Stages without a teacher do not see them.
    """

    sample: str | None = None
    dataset: str | None = None
    subset: str | None = None
    train: str | tuple[str, ...] | None = None
    validation: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    unlabelled: str | tuple[str, ...] | None = None
    augment: AugmentConfig | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    max_length: int = Field(default=128, ge=4)
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    per_class: int | None = Field(default=None, ge=2)
    limit: int | None = Field(default=None, ge=2)
    seed: int = 0

    @field_validator("sample", "dataset", "train", "unlabelled")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is not None and not (value and all(value)):
            raise ValueError(f"names nothing; give a name or a file, or leave it out (got {value!r})")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of sample, dataset and train; got {given or 'none'}")
        return self


class TrainConfig(Strict):
    """How a stage trains. `precision` "auto" is bf16 autocast where the hardware computes in it, else fp32."""

    epochs: float = Field(default=3.0, gt=0, le=1e6)
    max_steps: int = Field(default=-1, ge=-1)
    batch_size: int = Field(default=32, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    optimizer: Literal["adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch_fused"
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    save: Literal["epoch", "no"] | int = "epoch"
    keep_checkpoints: int = Field(default=1, ge=1)
    # What numpy's generator takes.
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("save", mode="before")
    @classmethod
    def _save(cls, value: Any) -> Any:
        if value in ("epoch", "no") or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"wants 'epoch', 'no' or a number of steps, at least 1; got {value!r}")


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


class ExportConfig(Strict):
    """The ONNX file, and how far it may be from the trained model before the run fails.

    `label_agreement`: least fraction of rows with the trained model's label. `metric_drop`: largest loss of the task's
    metric against the trained model. `max_abs_error`: largest logit difference (regression; no limit when None).
    `cache`: a language model's file takes the keys and values of earlier tokens and gives those of all, so that
    generating does not compute them anew; without, it scores texts.
    """

    enabled: bool = True
    cache: bool = True
    attention: Literal["fused", "qattention"] = "qattention"
    label_agreement: float = Field(default=0.99, ge=0, le=1)
    metric_drop: float = Field(default=0.005, ge=0)
    max_abs_error: float | None = Field(default=None, gt=0)
    batch: int = Field(default=32, ge=1)
    threads: int | None = Field(default=None, ge=1)
    latency_shapes: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 32), (1, 128), (8, 128))
    latency_rounds: int = Field(default=3, ge=1)


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
        raise ValueError(_explain(error, registry[name], f"{kind} {name}")) from None


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """One line for the first problem: path, value and what is allowed."""
    problems = _problems(error)
    first = problems[0]
    path = ".".join(str(p) for p in first["loc"])
    at = f"{where}.{path}" if path and where else (path or where)
    rest = len(problems) - 1
    more = f" (and {rest} more)" if rest else ""
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(model, first["loc"][:-1])
        name = str(first["loc"][-1])
        return f"{at}: unknown field; allowed: {', '.join(allowed)}{nearest(name, allowed)}{more}"
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "literal_error":
        more = nearest(str(first["input"]), first["ctx"]["expected"].split("'")[1::2]) + more
    if first["type"] == "value_error":
        return f"{at}: {message}{more}" if at else f"{message}{more}"
    return (
        f"{at}: {message} (got {first.get('input')!r}){more}"
        if first["type"] != "missing"
        else f"{at}: is required{more}"
    )


def _problems(error: ValidationError) -> list[Any]:
    """All problems but one that follows from another: a list lacks the item that is wrong, and is called too short."""
    problems: list[Any] = list(error.errors(include_url=False))

    def follows(problem: Any) -> bool:
        at = problem["loc"]
        inside = any(len(other["loc"]) > len(at) and other["loc"][: len(at)] == at for other in problems)
        return problem["type"] == "too_short" and inside

    return [problem for problem in problems if not follows(problem)]


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    current: Any = model
    for step in location:
        if isinstance(step, int):
            continue
        annotation = current.model_fields[step].annotation
        arguments = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        current = next(a for a in arguments if issubclass(a, BaseModel))
    return sorted(current.model_fields)


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
        raise UserError(f"{where}: {_explain(error, Recipe, '')}") from None


def smoke(recipe: Recipe) -> Recipe:
    """The same recipe on a few rows: every step of the run, in under a minute; tolerances do not apply to noise."""
    document = json.loads(recipe.model_dump_json())
    document["smoke"] = True
    document["data"] |= {"limit": min(96, recipe.data.limit or 96), "max_length": min(32, recipe.data.max_length)}
    for stage in document["stages"]:
        stage["train"] |= {"epochs": 1, "max_steps": 4, "batch_size": min(8, stage["train"]["batch_size"])}
    document["export"] |= {"latency_rounds": 1, "latency_shapes": [[1, 32]]}
    return parse_recipe(document)
