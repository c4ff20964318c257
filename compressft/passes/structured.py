"""Structured pruning: whole attention heads and FFN neurons, chosen while training, really removed at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.anatomy import anatomy
from compressft.model import compress_linear
from compressft.modules.gate import ColumnGate
from compressft.modules.linear import CompressedLinear
from compressft.schedule import SHAPES, ramp
from compressft.shrink import shrink
from compressft.transform import PARTS, Context, Transform


class Structured(Transform):
    """Remove the heads and FFN neurons with the smallest first-order importance.

    Importance is an exponential average of |dL/dmask| (Michel et al. 2019, equation 2), collected while training runs
    under the present masks; dropped parts keep a gradient and may return until the schedule ends. Sparsity follows
    `schedule` from 0 at progress `start` to its target at `end`, then stays (cool-down). FFN neurons stay in multiples
    of `align`; grouped-query models drop a KV head with all its query heads.

    Fields: `heads`, `ffn`: fraction to remove, in [0, 1). `floor_heads`, `floor_ffn`: the least a layer keeps.
    `uniform`: the same number in every layer, so that the saved model also loads with plain `from_pretrained` (as far
    as its configuration can say the shape).
    """

    type: Literal["structured"] = "structured"
    order: ClassVar[int] = PARTS
    heads: float = Field(default=0.0, ge=0, lt=1)
    ffn: float = Field(default=0.0, ge=0, lt=1)
    start: float = Field(default=0.05, ge=0, lt=1)
    end: float = Field(default=0.6, gt=0, le=1)
    schedule: Literal["cubic", "linear", "cosine", "constant"] = "cubic"
    align: int = Field(default=32, ge=1)
    floor_heads: int = Field(default=1, ge=1)
    floor_ffn: int = Field(default=32, ge=1)
    momentum: float = Field(default=0.98, ge=0, lt=1)
    uniform: bool = False

    def prepare(self, model: nn.Module, context: Context) -> None:
        for layer in anatomy(model).layers:
            if self.heads > 0:
                size = layer.head_dim * layer.heads // layer.kv_heads
                self._gate(model, f"{layer.name}.{layer.family.o}", layer.kv_heads, size)
            if self.ffn > 0:
                self._gate(model, f"{layer.name}.{layer.family.down}", layer.ffn, 1)

    def _gate(self, model: nn.Module, path: str, groups: int, size: int) -> None:
        linear = compress_linear(model, path)
        linear.gates[self.type] = ColumnGate(groups, size).to(linear.weight.device)

    def planned(self, target: float, progress: float) -> float:
        """Sparsity the schedule asks for."""
        return target * SHAPES[self.schedule](ramp(progress, self.start, self.end))

    def after_step(self, model: nn.Module, progress: float) -> None:
        done = progress >= self.end
        for target, align, floor, gates in self._kinds(model):
            for gate in gates:
                gate.accumulate(self.momentum)
                gate.measure(not done)
            if progress > self.start:
                kept = 1.0 - self.planned(target, progress)
                select = keep_equally if self.uniform else keep_globally
                for gate, groups in zip(gates, select([g.importance for g in gates], kept, align, floor), strict=True):
                    gate.keep(groups)

    def finalize(self, model: nn.Module) -> None:
        keep: list[dict[str, Tensor]] = []
        for layer in anatomy(model).layers:
            kept: dict[str, Tensor] = {}
            for name, path in (("heads", layer.family.o), ("ffn", layer.family.down)):
                linear = layer.part(path)
                if isinstance(linear, CompressedLinear) and self.type in linear.gates:
                    gate: Any = linear.gates[self.type]
                    gate.measure(False)
                    kept[name] = torch.nonzero(gate.mask).flatten()
                    linear.fold(self.type)
            keep.append(kept)
        shrink(model, keep)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        result = {}
        for name, (target, _, _, gates) in zip(self._names(), self._kinds(model), strict=True):
            masks = torch.cat([gate.mask.detach() for gate in gates])
            planned = self.planned(target, progress)
            result[name] = {"now": float(1.0 - masks.mean()), "planned": planned, "target": target}
        return result

    def conflict(self, others: Sequence[Transform]) -> str | None:
        if self.heads == 0 and self.ffn == 0:
            return "pass structured: heads and ffn are both 0; set one of them"
        if self.end <= self.start:
            return f"pass structured.end: {self.end} is not after structured.start {self.start}"
        return None

    def _names(self) -> list[str]:
        return [name for name, target in (("heads", self.heads), ("ffn", self.ffn)) if target > 0]

    def _kinds(self, model: nn.Module) -> list[tuple[float, int, int, list[ColumnGate]]]:
        layers = anatomy(model).layers
        kinds = []
        for target, align, floor, path in (
            (self.heads, 1, self.floor_heads, "o"),
            (self.ffn, self.align, self.floor_ffn, "down"),
        ):
            if target > 0:
                gates = [layer.part(getattr(layer.family, path)).gates[self.type] for layer in layers]  # type: ignore[index]
                kinds.append((target, align, floor, gates))
        return kinds


def keep_equally(scores: list[Tensor], kept: float, align: int, floor: int) -> list[Tensor]:
    """The same number of groups per layer; ascending indices of the highest scores."""
    smallest = min(len(score) for score in scores)
    number = _aligned(kept * smallest, align, floor, smallest)
    return [_top(score, number) for score in scores]


def keep_globally(scores: list[Tensor], kept: float, align: int, floor: int) -> list[Tensor]:
    """Spend one budget over all layers where the importance is; per-layer counts are multiples of `align`.

    Scores are normalised per layer to unit L2 norm (Michel et al. 2019). Each layer is cut into blocks of `align`
    neurons in descending order; the blocks with the highest means are kept, after every layer has its floor. A layer
    whose size is no multiple of `align` ends in a smaller block, and may so be kept whole.
    """
    sizes = [len(score) for score in scores]
    minimum = [_aligned(0, align, floor, size) for size in sizes]
    budget = max(kept * sum(sizes), sum(minimum))
    blocks = []
    for layer, score in enumerate(scores):
        ordered = (score / score.norm().clamp(min=1e-30)).sort(descending=True, stable=True).values.tolist()
        for first in range(minimum[layer], sizes[layer], align):
            block = ordered[first : first + align]
            blocks.append((-sum(block) / len(block), layer, first, len(block)))
    numbers = list(minimum)
    spent = sum(numbers)
    for _, layer, _, width in sorted(blocks):
        # Up to half a block beyond the budget: the nearest number of blocks.
        if spent + width / 2 <= budget:
            numbers[layer] += width
            spent += width
    return [_top(score, number) for score, number in zip(scores, numbers, strict=True)]


def _aligned(number: float, align: int, floor: int, size: int) -> int:
    """Nearest of `size` and the multiples of `align` below it that is at least `floor` (rounded up to a multiple)."""
    low = -(-floor // align) * align
    nearest = round(number / align) * align
    if abs(size - number) < abs(nearest - number):
        nearest = size
    return min(max(nearest, low), size)


def _top(score: Tensor, number: int) -> Tensor:
    return score.sort(descending=True, stable=True).indices[:number].sort().values
