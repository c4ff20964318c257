"""The sections of a recipe that say how a stage trains and what is exported."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from compressft.utils.strict import Strict

# Rows at a time outside of training, where a stage's eval_batch_size does not want fewer.
EVALUATION_BATCH = 32


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
    def _save(cls, value: object) -> object:
        if value in ("epoch", "no") or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"wants 'epoch', 'no' or a number of steps, at least 1; got {value!r}")


class ExportConfig(Strict):
    """The ONNX file, and how far it may be from the trained model before the run fails.

    `label_agreement`: least fraction of rows with the trained model's label. `metric_drop`: largest loss of the task's
    metric against the trained model. `max_abs_error`: largest logit difference (regression; no limit when None).
    `cache`: a language model's file takes the keys and values of earlier tokens and gives those of all, so that
    generating does not compute them again; without, it scores texts.
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
