"""What sits in the `quantizer` slot of a linear layer: it multiplies as the deployed layer will."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.int4 import (
    Grid,
    dequantise,
    fake_quantise,
    grid_of,
    on_live_columns,
    quantise,
    round_inputs,
    straight_through,
)
from compressft.modules.int8 import (
    InputGrid,
    LayerRounding,
    activation_scale,
    portable_scale,
    quantise_weight,
    quantised_linear,
    weight_scale,
)
from compressft.modules.kinds import Extra, built, known
from compressft.modules.last_input import last_input
from compressft.utils import ranks
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from compressft.modules.embedding import CompressedEmbedding

Ranges = Literal["static", "dynamic", "learned"]
Format = Literal["operators", "qdq"]
Processors = Literal["any", "vnni"]
# Batches whose minima and maxima a learned range starts from.
FIRST_BATCHES = 16


class Quantizer(Extra):
    """Base of the `quantizer` slot.

    Attributes:
        active: off leaves the layer in floating point.
        rate: share of the weights that is rounded in training; the others are drawn again at each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.rate = 1.0

    @property
    def ready(self) -> bool:
        """Whether the layer computes in the deployed arithmetic now (else in floating point)."""
        return self.active

    def observe(self, x: Tensor, columns: Tensor | None) -> None:
        """See an input (..., in) in training; those of columns whose factor is 0 (in,) do not count."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        """x (..., in) times the quantised weight (out, in), plus the bias (out,): (..., out)."""
        raise NotImplementedError

    def settle(self) -> None:
        """Training is over: everything is quantised, nothing is learned any more."""
        self.active, self.rate = True, 1.0


@known
class Int8Quantizer(Quantizer):
    """u8 inputs by the range of one linear layer, s8 weights.

    `low`, `high` (fp32) are the range, `batches` (int64) is how many batches were seen. `ranges` "static" moves the
    range as an exponential average of per-batch minima and maxima (the first batch is copied); "learned" makes its two
    ends parameters, which start from the average over the first 16 batches and get a gradient afterwards; "dynamic"
    takes each input tensor's own range. Unless dynamic, a layer that has seen no batch yet stays in floating point.

    `target` "any" puts 8-bit weights on the grid of `portable_scale`, right on every processor; "vnni" takes all of
    [-127, 127], whose sums pass 16 bits on x86 processors with AVX2 or AVX-512 and without VNNI. `weight_bits` 7 is
    right everywhere.
    """

    kind: ClassVar[str] = "int8"
    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(
        self,
        ranges: Ranges = "static",
        momentum: float = 0.99,
        weight_bits: int = 8,
        format: Format = "operators",
        target: Processors = "any",
    ) -> None:
        super().__init__()
        self.ranges = ranges
        self.momentum = momentum
        self.weight_bits = weight_bits
        self.format = format
        self.target = target
        self.observing = True
        for name in ("low", "high"):
            if ranges == "learned":
                self.register_parameter(name, nn.Parameter(torch.zeros(())))
            else:
                self.register_buffer(name, torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @property
    def ready(self) -> bool:
        """Whether the layer computes in int8 now."""
        return self.active and (self.ranges == "dynamic" or int(self.batches) > 0)

    @torch.no_grad()
    def observe(self, x: Tensor, columns: Tensor | None) -> None:
        """Move the range towards x; nothing when dynamic or frozen, or when the gradient moves it."""
        if self.ranges == "dynamic" or not self.observing:
            return
        seen = int(self.batches)
        if self.ranges == "learned":
            momentum = seen / (seen + 1)
            if seen >= FIRST_BATCHES:
                self.batches += 1
                return
        else:
            momentum = self.momentum if seen else 0.0
        low, high = ranks.widest(*_range(x, columns))
        self.low.mul_(momentum).add_(low * (1.0 - momentum))
        self.high.mul_(momentum).add_(high * (1.0 - momentum))
        self.batches += 1

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        rate = self.rate if self.training else 1.0
        learns = self.ranges == "learned" and self.training and self.observing and int(self.batches) > FIRST_BATCHES
        grid, ends = self.scale(x, columns), (self.low, self.high) if learns else None
        rounding = LayerRounding(self.weight_scale(weight, columns), rate, ends)
        return quantised_linear(x, weight, bias, grid, rounding)

    @torch.no_grad()
    def weight_scale(self, weight: Tensor, columns: Tensor | None = None) -> Tensor:
        """Scales (out,) of a weight's rows; `columns` as in `observe`."""
        if self.weight_bits == 8 and self.target == "any":
            return portable_scale(weight, columns)
        return weight_scale(weight, self.weight_bits)

    @torch.no_grad()
    def scale(self, x: Tensor, columns: Tensor | None = None) -> InputGrid:
        """Scale and zero point for the input x; `columns` as in `observe`."""
        low, high = _range(x, columns) if self.ranges == "dynamic" else (self.low.detach(), self.high.detach())
        return activation_scale(low, high)

    def describe(self) -> dict[str, JSON]:
        return {
            "ranges": self.ranges,
            "momentum": self.momentum,
            "weight_bits": self.weight_bits,
            "format": self.format,
            "target": self.target,
        }

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> Int8Quantizer:
        # Folders that do not say it were written when there was one grid.
        arguments: dict[str, JSON] = {"target": "vnni", **entry}
        if "dynamic" in arguments:
            # As folders say it that were written before there was a third way.
            arguments["ranges"] = "dynamic" if arguments.pop("dynamic") else "static"
        new = built(cls, arguments)
        new.observing = False
        return new

    def settle(self) -> None:
        super().settle()
        self.observing = False
        if self.ranges == "learned":
            # What was learned ships as a static range.
            for name in ("low", "high"):
                value = getattr(self, name).detach().clone()
                delattr(self, name)
                self.register_buffer(name, value)
            self.ranges = "static"


@known
class Int4Quantizer(Quantizer):
    """Weights in four bits by blocks of inputs (`compressft.modules.int4`), inputs in floating point.

    `accuracy_level` 4 rounds the inputs too, as onnxruntime's faster kernel does on x86. The grid is that of the
    weight as it is; `fix` pins one down (buffers `scale`, `zero_point`, fp32 (out, blocks)). Gated-off columns are
    left out before blocks are cut.
    """

    kind: ClassVar[str] = "int4"
    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, block: int = 32, symmetric: bool = True, accuracy_level: int = 0) -> None:
        super().__init__()
        self.block = block
        self.symmetric = symmetric
        self.accuracy_level = accuracy_level
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def fix(self, grid: Grid) -> None:
        """Use this grid from now on, whatever the weight does."""
        self.register_buffer("scale", grid.scale.clone())
        self.register_buffer("zero_point", grid.zero_point.clone())

    def grid(self, weight: Tensor) -> Grid:
        """The grid that a weight (out, in) without dead columns is rounded to."""
        if self.scale is not None and self.zero_point is not None:
            return Grid(self.scale, self.zero_point)
        return grid_of(weight, self.block, self.symmetric)

    @torch.no_grad()
    def rounded(self, weight: Tensor) -> Tensor:
        """The weight that the integers stand for, in the weight's dtype."""
        grid = self.grid(weight)
        return dequantise(quantise(weight, self.block, grid), grid, weight.shape[1]).to(weight.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        if self.scale is not None:
            # A fixed grid is one of all columns.
            columns = None
        value = on_live_columns(weight.detach(), columns, self.rounded)
        if self.training and self.rate < 1.0:
            value = torch.where(torch.rand(weight.shape, device=weight.device) < self.rate, value, weight.detach())
        if self.accuracy_level == 4:
            x = straight_through(x, on_live_columns(x.detach(), columns, lambda part: round_inputs(part, self.block)))
        return F.linear(x, straight_through(weight, value), bias)

    def describe(self) -> dict[str, JSON]:
        """The constructor's arguments, and the shape of a grid that is fixed."""
        entry: dict[str, JSON] = {
            "block": self.block,
            "symmetric": self.symmetric,
            "accuracy_level": self.accuracy_level,
        }
        return entry if self.scale is None else {**entry, "grid": [*self.scale.shape]}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> Int4Quantizer:
        return built(cls._again, entry)

    @classmethod
    def _again(cls, grid: list[int] | None = None, **arguments: JSON) -> Int4Quantizer:
        new = built(cls, arguments)
        if grid is not None:
            new.fix(Grid(torch.zeros(grid), torch.zeros(grid)))
        return new


@known
class TableQuantizer(Quantizer):
    """An output layer whose weight is the tokens' embedding table: it multiplies by the rows that are looked up.

    Rows are rounded as a `CompressedEmbedding` of these bits rounds them, inputs are not.
    """

    kind: ClassVar[str] = "table"
    # In a tuple: the table is registered elsewhere.
    table: tuple[CompressedEmbedding, ...] = ()

    def __init__(self, bits: int, block: int) -> None:
        super().__init__()
        self.bits, self.block = bits, block

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None) -> Tensor:
        if self.table and self.table[0].columns is not None:
            columns = self.table[0].columns()
        return F.linear(x, straight_through(weight, self.rounded(weight.detach(), columns)), bias)

    def rounded(self, weight: Tensor, columns: Tensor | None = None) -> Tensor:
        """The rows (..., dim) as they are looked up."""
        return on_live_columns(weight, columns, lambda rows: round_rows(rows, self.bits, self.block))

    def describe(self) -> dict[str, JSON]:
        return {"bits": self.bits, "block": self.block}


@torch.no_grad()
def round_rows(rows: Tensor, bits: int, block: int) -> Tensor:
    """Rows (rows, dim) on their own grids: 8 bits with a scale each, or 4 in symmetric blocks."""
    if bits == 4:
        return fake_quantise(rows, block, symmetric=True)
    scale = weight_scale(rows)
    return quantise_weight(rows, scale) * scale[:, None]


@torch.no_grad()
def _range(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest value, fp32; gated-off columns count as 0, which every range contains."""
    if columns is None:
        low, high = last_input.value(x, "range", lambda: torch.aminmax(x))
    else:
        # Per column and then over columns would be ten times as slow on CPU.
        low, high = torch.aminmax(x * columns)
    return low.float(), high.float()
