"""Quantisation-aware training in the int8 arithmetic that onnxruntime will use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import nn

from compressft.model.surgery import compress_linear
from compressft.modules.quantizer import Format, Int8Quantizer, Processors, Ranges
from compressft.passes.shared.quantised import (
    PARTS,
    ROUNDS,
    TableBlock,
    Tables,
    compress_tables,
    follow,
    quantised_linears,
    quantizers,
    rate,
    settle,
)
from compressft.passes.shared.select import check_exclude
from compressft.transform import QUANTISES, Claim, Context, Transform


class Int8(Transform):
    """u8 activations, s8 weights per output channel, embeddings s8 per row; head and LayerNorms stay fp32, but for a
    language model's head that shares the tokens' table, which is that table (its inputs stay fp32).

    `ranges`: "static" learns one input range per layer as an average of per-batch minima and maxima (a row's result
    does not depend on its batch mates); "learned" starts from the first 16 batches' average and then moves both ends by
    their gradient, with the learning rate `range_learning_rate` (Esser et al. 2020; Choi et al. 2018), and ships as
    static; "dynamic" takes each batch's own (DynamicQuantizeMatMul). Ranges are frozen from `freeze` on.

    `format`: "operators" exports onnxruntime's QuantizeLinear + MatMulIntegerToFloat; "qdq" (not with dynamic ranges)
    exports QuantizeLinear / DequantizeLinear around MatMul and nothing but standard ONNX operators, attention included,
    for other runtimes: portable, slower in onnxruntime.

    `start`: progress from which values are quantised. `noise`: progress until which only a random share of the weights
    is rounded, growing linearly from 0 at `start` (Fan et al. 2020); 0 rounds all at once.

    `target`: x86 processors without VNNI add u8 x s8 products by pairs in saturating 16 bits. "any" scales each output
    channel so that the sum of no pair can leave them (`modules.int8.portable_scale`), and the file gives the same
    answers on every processor; "vnni" takes the whole of [-127, 127] and is wrong on those: the report and `evaluate`
    say by how much. `weight_bits` 7 halves the integers instead: whatever is added in pairs, in any order.

    `embeddings`: "int8" per row, "int4" in blocks of `embedding_block` (32: 0.63 bytes a value, 128: 0.53) for the
    tokens and int8 for positions and types, or "none".
    `exclude` lists parts that stay fp32: "q", "k", "v", "o", "up", "down", "pooler", "embeddings", or a module's full
    path; a fused qkv projection stays fp32 where any of its three does.
    """

    type: Literal["int8"] = "int8"
    order: ClassVar[int] = QUANTISES
    looks: ClassVar[bool] = False
    ranges: Ranges = "static"
    format: Format = "operators"
    start: float = Field(default=0.0, ge=0, lt=1)
    freeze: float = Field(default=0.8, gt=0, le=1)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    range_learning_rate: float = Field(default=1e-3, gt=0)
    noise: float = Field(default=0.0, ge=0, le=1)
    weight_bits: Literal[7, 8] = 8
    target: Processors = "any"
    embeddings: Tables | bool = "int8"
    embedding_block: TableBlock = 32
    exclude: tuple[str, ...] = ()

    @field_validator("embeddings")
    @classmethod
    def _tables(cls, value: object) -> object:
        return {True: "int8", False: "none"}.get(value, value) if isinstance(value, bool) else value

    def prepare(self, model: nn.Module, context: Context) -> None:
        check_exclude(model, "pass int8.exclude", self.exclude, PARTS)
        for path in quantised_linears(model, self.exclude):
            layer = compress_linear(model, path)
            new = Int8Quantizer(self.ranges, self.momentum, self.weight_bits, self.format, self.target)
            layer.quantizer = new.to(layer.weight.device)
        compress_tables(model, self.embeddings, self.embedding_block, self.exclude)  # type: ignore[arg-type]

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        ends = [parameter for quantizer in quantizers(model) for parameter in quantizer.parameters()]
        return [{"params": ends, "lr": self.range_learning_rate, "weight_decay": 0.0}] if ends else []

    def after_step(self, model: nn.Module, progress: float) -> None:
        follow(model, progress >= self.start, rate(progress, self.start, self.noise))
        for quantizer in quantizers(model):
            if isinstance(quantizer, Int8Quantizer):
                quantizer.observing = progress < self.freeze

    def finalize(self, model: nn.Module) -> None:
        settle(model)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        on = progress >= self.start
        return {"bits": {"now": 8.0 if on else 32.0, "planned": 8.0 if on else 32.0, "target": 8.0}}

    def takes(self) -> Sequence[Claim]:
        return (ROUNDS,)

    def check(self) -> str | None:
        if self.freeze <= self.start:
            return f"pass int8.freeze: {self.freeze} is not after int8.start {self.start}; ranges would not be learned"
        if 0 < self.noise <= self.start:
            return f"pass int8.noise: {self.noise} is not after int8.start {self.start}; set 0 for no noise"
        if self.format == "qdq" and self.ranges == "dynamic":
            return "pass int8.format: 'qdq' needs fixed ranges; set int8.ranges to static or learned"
        return None
