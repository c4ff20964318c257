"""Quantisation-aware training in the int8 arithmetic that onnxruntime will use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from compressft.anatomy import anatomy
from compressft.errors import UserError, nearest
from compressft.model import compress_linear, replace
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.quantizer import Int8Quantizer
from compressft.transform import QUANTISES, Context, Transform

PARTS = ("q", "k", "v", "o", "up", "down", "pooler", "embeddings")


class Int8(Transform):
    """u8 activations, s8 weights per output channel, embeddings s8 per row; head and LayerNorms stay fp32.

    Fields: `ranges` "static" learns one input range per layer as an average of per-batch minima and maxima (exported
    as QuantizeLinear + MatMulIntegerToFloat; a row's result does not depend on its batch mates) or "dynamic" takes
    each batch's own (DynamicQuantizeMatMul). Fake quantisation is on from progress `start`; ranges are frozen from
    `freeze` on. `exclude` lists parts that stay fp32: "q", "k", "v", "o", "up", "down", "pooler", "embeddings", or a
    module's full path; a fused qkv projection stays fp32 where any of its three does.
    """

    type: Literal["int8"] = "int8"
    order: ClassVar[int] = QUANTISES
    ranges: Literal["static", "dynamic"] = "static"
    start: float = Field(default=0.0, ge=0, lt=1)
    freeze: float = Field(default=0.8, gt=0, le=1)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    embeddings: bool = True
    exclude: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, context: Context) -> None:
        modules = dict(model.named_modules())
        for name in self.exclude:
            if name not in PARTS and name not in modules:
                allowed = ", ".join(PARTS)
                raise UserError(
                    f"pass int8.exclude: {name!r} is neither a part nor a module of the model; parts: {allowed}"
                    f"{nearest(name, [*PARTS, *modules])}"
                )
        for path in self._linear_paths(model):
            layer = compress_linear(model, path)
            layer.quantizer = Int8Quantizer(self.ranges == "dynamic", self.momentum).to(layer.weight.device)
        if self.embeddings and "embeddings" not in self.exclude:
            parts = anatomy(model)
            for relative in parts.family.embedding_tables:
                if parts.path(relative) in self.exclude:
                    continue
                table = parts.backbone.get_submodule(relative)
                assert isinstance(table, nn.Embedding)
                replace(model, parts.path(relative), CompressedEmbedding.of(table))

    def after_step(self, model: nn.Module, progress: float) -> None:
        for module in model.modules():
            if isinstance(module, Int8Quantizer):
                module.active = progress >= self.start
                module.observing = progress < self.freeze
            elif isinstance(module, CompressedEmbedding):
                module.active = progress >= self.start

    def finalize(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, Int8Quantizer):
                module.active, module.observing = True, False
            elif isinstance(module, CompressedEmbedding):
                module.active = True

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        on = progress >= self.start
        return {"bits": {"now": 8.0 if on else 32.0, "planned": 8.0 if on else 32.0, "target": 8.0}}

    def conflict(self, others: Sequence[Transform]) -> str | None:
        if self.freeze <= self.start:
            return f"pass int8.freeze: {self.freeze} is not after int8.start {self.start}; ranges would not be learned"
        return None

    def _linear_paths(self, model: nn.Module) -> list[str]:
        parts = anatomy(model)
        family = parts.family
        roles = {family.q: "q", family.k: "k", family.v: "v", family.o: "o", family.down: "down"}
        roles |= dict.fromkeys(family.up, "up")
        if family.fused_qkv:
            roles[family.fused_qkv] = next((part for part in "qkv" if part in self.exclude), "q")
        paths = [
            f"{layer.name}.{path}"
            for layer in parts.layers
            for path in layer.linears
            if roles.get(path) not in self.exclude and f"{layer.name}.{path}" not in self.exclude
        ]
        pooler = parts.path(f"{family.pooler}.dense") if family.pooler else None
        excluded = bool({"pooler", pooler} & set(self.exclude))
        if pooler and not excluded and getattr(parts.backbone, "pooler", None) is not None:
            paths.append(pooler)
        return paths
