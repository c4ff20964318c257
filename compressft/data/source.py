"""Where rows come from: the data section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from compressft.utils.strict import Strict

# Where rows may come from: one of these at a time.
SOURCES = ("sample", "dataset", "train")


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
    the `subset` it may want, such as "sst2" of "glue"; "owner/name@v1.0" is a branch, tag or commit of it).

    Without a validation split, the fraction `validation_fraction` of train is carved out, stratified by label and
    seeded. `per_class` keeps a balanced sample of the training rows; `limit` the first rows after shuffling.
    `columns` maps the task's fields (text, text_b, label, score, tokens, tags) to column names.

    With `streaming` the training rows are read while training goes on and never kept, for sources larger than the disk;
    `limit` is then how many of them there are. They need a validation split of their own, which also says which labels
    there are, and a number of steps. What a method or pass decides by the rows, it decides by the first ten thousand.

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
    streaming: bool = False

    @model_serializer(mode="wrap")
    def _without_streaming(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A source that is not streamed is written, and hashed, as before there were streams.
        return {name: value for name, value in whole(self).items() if value or name != "streaming"}

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

    @model_validator(mode="after")
    def _streamed(self) -> DataConfig:
        if not self.streaming:
            return self
        for name in ("per_class", "unlabelled", "augment"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} needs all rows at once; remove it, or streaming")
        if self.train is not None and self.validation is None:
            raise ValueError("a stream has no rows to set aside; give validation, or remove streaming")
        return self


def is_named(data: Any) -> bool:
    """Whether a recipe's data section is several sources by name; one source's fields are its own."""
    return (
        isinstance(data, Mapping)
        and bool(data)
        and not set(data) & set(DataConfig.model_fields)
        and all(isinstance(value, Mapping | DataConfig) for value in data.values())
    )
