"""Four-bit weights, fp32 activations, in the layout of onnxruntime's MatMulNBits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.surgery import compress_linear
from compressft.modules.gptq import gptq
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer
from compressft.passes.shared.calibrate import second_moments
from compressft.passes.shared.quantised import (
    PARTS,
    ROUNDS,
    TableBlock,
    Tables,
    compress_tables,
    follow,
    quantised_linears,
    rate,
    settle,
)
from compressft.passes.shared.select import check_exclude
from compressft.transform import QUANTISES, Claim, Context, Resource, Transform, Want, without_labels
from compressft.utils.phases import steps


class Int4(Transform):
    """Weights in blocks of `block` inputs with a scale each (and a zero point unless `symmetric`), for
    `com.microsoft::MatMulNBits`: 0.63 (block 32) to 0.53 (block 128) bytes a weight; head and LayerNorms stay fp32.

    `rounding`: "nearest" rounds in every forward and lets the weights train through it. "gptq" is for methods that
    leave the weights frozen: before training they are rounded once with error compensation (Frantar et al. 2022),
    layer by layer, each looking at what `rows` training rows give behind the layers already rounded; the grid is then
    fixed, and adapters or deltas train on the rounded weights. A pooler trains with the head, and so to nearest.

    `start`: progress from which weights are rounded. `noise`: progress until which only a random share of them is,
    growing linearly from 0 at `start` (Fan et al. 2020); 0 rounds all at once. `accuracy_level` 4 lets the runtime
    round the inputs, which is much faster, and rounds them in training too, to s8 per block, as onnxruntime does it on
    x86-64 from AVX2 on. Kernels for arm64's dot products round whole rows and others round nothing: the file is not
    portable and the report says so; 0 gives the same answers everywhere. `embeddings`, `embedding_block` and
    `exclude` as in `int8`.
    """

    type: Literal["int4"] = "int4"
    order: ClassVar[int] = QUANTISES
    looks: ClassVar[bool] = False
    block: Literal[32, 64, 128] = 32
    symmetric: bool = True
    rounding: Literal["nearest", "gptq"] = "nearest"
    rows: int = Field(default=128, ge=1)
    start: float = Field(default=0.0, ge=0, lt=1)
    noise: float = Field(default=0.0, ge=0, le=1)
    accuracy_level: Literal[0, 4] = 0
    embeddings: Tables = "int8"
    embedding_block: TableBlock = 32
    exclude: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, context: Context) -> None:
        check_exclude(model, "pass int4.exclude", self.exclude, PARTS)
        paths = quantised_linears(model, self.exclude)
        fixed = self._frozen(model, paths) if self.rounding == "gptq" else []
        compress_tables(model, self.embeddings, self.embedding_block, self.exclude)
        for path in paths:
            layer = compress_linear(model, path)
            new = Int4Quantizer(self.block, self.symmetric, self.accuracy_level)
            layer.quantizer = new.to(layer.weight.device)
            # Off until its own weight is rounded: what flows into a layer comes from the rounded ones before it.
            new.active = path not in fixed
        if fixed:
            self._compensate(model, fixed, context)

    def _frozen(self, model: nn.Module, paths: list[str]) -> list[str]:
        """The paths, less a pooler that is trained: as a part of the new task it always is."""
        trained = [path for path in paths if model.get_submodule(path).weight.requires_grad]  # type: ignore[union-attr]
        in_layers = [path for path in trained if any(path.startswith(f"{x.name}.") for x in anatomy(model).layers)]
        if in_layers:
            raise UserError(
                f"pass int4.rounding: 'gptq' rounds frozen weights, and {in_layers[0]} is trained; "
                "use 'nearest', name it in int4.exclude, or take a method that freezes the weights"
            )
        return [path for path in paths if path not in trained]

    def _compensate(self, model: nn.Module, paths: list[str], context: Context) -> None:
        batches = context.calibration(self.rows, "pass int4.rounding gptq")
        batches = [without_labels(batch) for batch in batches]
        for group in steps(list(_by_layer(model, paths)), "pass int4: rounding"):
            for path, moments in second_moments(model, group, batches).items():
                layer = model.get_submodule(path)
                assert isinstance(layer, CompressedLinear) and isinstance(layer.quantizer, Int4Quantizer)
                layer.weight.data, grid = gptq(layer.weight.data, moments, self.block, self.symmetric)
                layer.quantizer.fix(grid)
                layer.quantizer.active = True

    def after_step(self, model: nn.Module, progress: float) -> None:
        follow(model, progress >= self.start, rate(progress, self.start, self.noise))

    def finalize(self, model: nn.Module) -> None:
        settle(model)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        on = progress >= self.start
        return {"bits": {"now": 4.0 if on else 32.0, "planned": 4.0 if on else 32.0, "target": 4.0}}

    def check(self) -> str | None:
        if 0 < self.noise <= self.start:
            return f"pass int4.noise: {self.noise} is not after int4.start {self.start}; set 0 for no noise"
        if self.rounding == "gptq" and (self.start > 0 or self.noise > 0):
            return "pass int4.rounding: 'gptq' rounds before training; leave int4.start and int4.noise at 0"
        return None

    def takes(self) -> Sequence[Claim]:
        return (ROUNDS,)

    def wants(self) -> Sequence[Want]:
        if self.rounding == "nearest":
            return ()
        # Blocks are cut from the input columns.
        fixed = (Resource.VALUES, Resource.STORE, Resource.COLUMNS)
        reason = "'gptq' fixes the weights before training"
        return [Want(one, reason, "rounding", "use 'nearest'") for one in fixed]


def _by_layer(model: nn.Module, paths: list[str]) -> list[list[str]]:
    """Paths of one transformer layer together, in order; the pooler comes last."""
    groups = [[p for p in paths if p.startswith(f"{layer.name}.")] for layer in anatomy(model).layers]
    rest = [path for path in paths if not any(path in group for group in groups)]
    return [group for group in [*groups, rest] if group]
