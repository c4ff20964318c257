"""The `gates` of a weight: what multiplies it while training decides what goes; folded into the values at the end."""

from __future__ import annotations

from collections.abc import Sequence, ValuesView
from typing import TYPE_CHECKING, Protocol

import torch
from compressft_kernels import masked_linear, pack_mask, packed_linear, unpack_mask
from compressft_kernels.kept import Kept
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.dtypes import like
from compressft.modules.rank import flatten, keep_largest, nth_largest, nth_largest_each
from compressft.utils import ranks


class Gate(nn.Module):
    """What any gate does: it maps a weight (out, in) to the gated weight, differentiably."""

    # What lives: by weight, by tile or by group.
    mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) -> (out, in)."""
        raise NotImplementedError

    def columns(self) -> Tensor | None:
        """Factor per input column (in,), 0 for columns that are gone; None where the gate knows no whole columns."""
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in) times the gated weight."""
        raise NotImplementedError


class Gates(nn.ModuleDict):
    """All gates of one weight by the type of the pass that put them there; their factors multiply."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> Gate: ...

        def values(self) -> ValuesView[Gate]: ...

    def forward(self, weight: Tensor) -> Tensor:
        for gate in self.values():
            weight = gate(weight)
        return weight

    def columns(self) -> Tensor | None:
        """Product of the gates' column factors, without a graph."""
        known = [c.detach() for gate in self.values() if (c := gate.columns()) is not None]
        product = None
        for columns in known:
            product = columns if product is None else product * columns
        return product


class GroupGate(Gate):
    """Base of gates of groups of `size` adjacent input columns that stay or go together: a head's, or one neuron's.

    Buffers: `mask` (groups,) fp32, 0 for a group that is dropped, and `importance` (groups,) fp32. `mask` is a buffer,
    not a parameter: no optimiser and no gradient clipping sees it.
    """

    mask: Tensor
    importance: Tensor

    def __init__(self, groups: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mask", torch.ones(groups))
        self.register_buffer("importance", torch.zeros(groups))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.columns()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, *like(x, self(weight), bias))

    def columns(self) -> Tensor:
        """The mask per input column, (groups * size,)."""
        return self.by_column(self.mask)

    def by_column(self, values: Tensor) -> Tensor:
        """(groups,) -> (groups * size,)."""
        return values if self.size == 1 else values.repeat_interleave(self.size)

    @torch.no_grad()
    def keep(self, groups: Tensor) -> None:
        """Keep exactly these group indices."""
        self.mask.zero_()
        self.mask[groups] = 1.0


class ColumnGate(GroupGate):
    """Groups that are kept (1) or dropped (0) by what training shows of their importance.

    While `measure()` is on, `mask` collects the gradient of the loss with respect to itself: the first-order importance
    of Michel et al. (2019), equation 2, which is also the movement score of Sanh et al. (2020) summed over the group. A
    dropped group still gets a gradient, so it may return.
    """

    def measure(self, on: bool) -> None:
        """Collect (or stop collecting) gradients of the mask."""
        self.mask.requires_grad_(on)
        if not on:
            self.mask.grad = None

    @torch.no_grad()
    def accumulate(self, momentum: float) -> None:
        """Move `importance` towards the newest |gradient| and forget the gradient; nothing where there is none.

        The mask is no parameter, so that no optimiser, clipping or count meets it: of several processes' gradients it
        takes the mean itself.
        """
        if self.mask.grad is not None:
            ranks.average([self.mask.grad])
            score = self.mask.grad.detach().abs()
            # fp16 loss scaling skips steps whose gradients overflow; so does the average.
            if torch.isfinite(score).all():
                self.importance.mul_(momentum).add_(score * (1.0 - momentum))
            self.mask.grad = None


class MaskGate(Gate):
    """A 0/1 mask over single weights, stored at one bit each.

    Buffers: `bits` (out, ceil(in / 8)) uint8, all ones at the start; `updates` int64, how many updates of the mask the
    pass has done (so that a resumed run does none twice). The weight's gradient is masked like the weight; what is
    pruned stays 0 in the product whatever momentum or decay do to the stored value.
    """

    bits: Tensor
    updates: Tensor

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.width = columns
        self.register_buffer("bits", pack_mask(torch.ones(rows, columns, dtype=torch.bool)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def mask(self) -> Tensor:
        """(out, in) bool."""
        return unpack_mask(self.bits, self.width)

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        """Set the mask, (out, in) bool."""
        self.bits.copy_(pack_mask(mask))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def columns(self) -> None:
        """It knows no whole columns."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return packed_linear(x, weight, self.bits, bias=bias)


class _Context(Kept, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    tile: tuple[int, int]


class _Thresholded(torch.autograd.Function):
    """W * 1[scores > threshold], straight-through: dL/dscores = dL/dW' * W, summed over each score's tile.

    Sanh, Wolf & Rush (2020), equation 3.
    """

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, scores: Tensor, threshold: Tensor, tile: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(weight, scores, threshold)
        ctx.tile = tile
        return _where_alive(weight, scores, threshold, tile)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, scores, threshold = ctx.saved_tensors
        d_weight = _where_alive(grad, scores, threshold, ctx.tile) if ctx.needs_input_grad[0] else None
        d_scores = pool(grad * weight, ctx.tile) if ctx.needs_input_grad[1] else None
        return d_weight, d_scores, None, None


def _where_alive(values: Tensor, scores: Tensor, threshold: Tensor, tile: tuple[int, int]) -> Tensor:
    """values (out, in) times 1[scores > threshold]."""
    plain = values.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and tile == (1, 1) and values.dtype == scores.dtype:
        # One pass; a number costs no waiting here.
        return torch.ops.aten.threshold_backward(values, scores, float(threshold))
    # On CPU comparing into floats is several times as fast as multiplying by bools.
    alive = torch.gt(scores, threshold, out=torch.empty_like(scores, dtype=values.dtype))
    # A single weight's comparison is nobody else's.
    return alive.mul_(values) if tile == (1, 1) else spread(alive, tile, values.shape) * values


def spread(values: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """One value per tile -> one per weight, (out, in); the last row and column of tiles may be cut."""
    if tile == (1, 1):
        return values
    return values.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[: shape[0], : shape[1]]


def pool(values: Tensor, tile: tuple[int, int]) -> Tensor:
    """Sum over each tile of an (out, in) tensor."""
    if tile == (1, 1):
        return values
    padded = F.pad(values, (0, -values.shape[1] % tile[1], 0, -values.shape[0] % tile[0]))
    return padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).sum((1, 3))


class ScoreGate(Gate):
    """Learned scores decide: a weight (or tile of weights) lives while its score is above `threshold`.

    Parameter `scores` (ceil(out / tile rows), ceil(in / tile columns)); buffer `threshold`, an fp32 scalar, -inf at the
    start (everything lives). Without tiles the product runs on `masked_linear`, which never stores the masked weight.

    Args:
        rows, columns: the weight's shape.
        tile: (rows, columns) of a tile; those at the last row and column of tiles may be smaller.
        initial: every score's first value.
        unit: so many adjacent input columns will be removed together once all their tiles are dead (the first ones
            stay if all are); None where none will.
    """

    threshold: Tensor
    # What the pass that has put it there says, of no matter here.
    weight_of_penalty: float = 0.0

    def __init__(
        self,
        rows: int,
        columns: int,
        tile: tuple[int, int] = (1, 1),
        initial: float = 0.0,
        unit: int | None = None,
    ) -> None:
        super().__init__()
        self.tile = tile
        self.unit = unit
        self.width = columns
        shape = (-(-rows // tile[0]), -(-columns // tile[1]))
        self.scores = nn.Parameter(torch.full(shape, initial))
        self.register_buffer("threshold", torch.tensor(-torch.inf))

    @property
    def mask(self) -> Tensor:
        """Live scores, bool, in the scores' shape."""
        return self.scores.detach() > self.threshold

    def forward(self, weight: Tensor) -> Tensor:
        return _Thresholded.apply(weight, self.scores, self.threshold, self.tile)  # type: ignore[return-value]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.tile != (1, 1) or torch.compiler.is_compiling():
            # The kernel's threshold is a number, which a compiled graph would have to stop for.
            return F.linear(x, self(weight), bias)
        return masked_linear(x, weight, self.scores, threshold=float(self.threshold), bias=bias)

    def columns(self) -> Tensor | None:
        """0 for columns that will be removed, (in,); None without a `unit`."""
        if self.unit is None:
            return None
        columns = self.mask.any(0).repeat_interleave(self.tile[1])[: self.width]
        groups = columns.unflatten(0, (-1, self.unit)).any(1)
        groups[0] |= ~groups.any()
        return groups.repeat_interleave(self.unit).to(self.threshold.dtype)

    def keep_top(self, number: int) -> None:
        """Let exactly the `number` highest scores live, as `keep_top` does."""
        keep_top([self], number)


def keep_top(gates: Sequence[ScoreGate], number: int) -> None:
    """Let exactly the `number` highest scores of all these gates live; ties are broken by position.

    A dropped score equal to the lowest kept one is moved to the next lower float, so that the comparison alone tells
    the two apart. Subnormal scores become 0 where that matters: hardware may take them for 0 when it compares.
    """
    keep_top_each([gates], [number])


@torch.no_grad()
def keep_top_each(pools: Sequence[Sequence[ScoreGate]], numbers: Sequence[int]) -> None:
    """`keep_top` for several pools of gates, ranked at the same time on CPU."""
    ranked = []
    for gates, number in zip(pools, numbers, strict=True):
        if 0 < number < sum(gate.scores.numel() for gate in gates):
            ranked.append((gates, number))
            continue
        for gate in gates:
            gate.threshold.fill_(torch.inf if number <= 0 else -torch.inf)
    found = nth_largest_each(
        [flatten([g.scores.detach() for g in gates]) for gates, _ in ranked], [n for _, n in ranked]
    )
    for (gates, number), (lowest, alone) in zip(ranked, found, strict=True):
        limit = _next_below(lowest)
        tiny = torch.finfo(lowest.dtype).tiny
        if not alone or lowest.abs() < tiny or limit.abs() < tiny:
            limit = _separate([gate.scores for gate in gates], number)
        for gate in gates:
            gate.threshold.copy_(limit)


def _separate(scores: Sequence[Tensor], number: int) -> Tensor:
    """Change equal and subnormal scores so that exactly `number` are above the returned limit."""
    tiny = torch.finfo(scores[0].dtype).tiny
    for values in scores:
        values.masked_fill_(values.abs() < tiny, 0.0)
    lowest = nth_largest(flatten(scores), number)
    limit = _next_below(lowest)
    if limit.abs() < tiny:
        # Below 0 and below the least normal number.
        limit = lowest.new_tensor(0.0 if lowest > 0 else -tiny)
    for values, mask in zip(scores, keep_largest(scores, number), strict=True):
        values.masked_fill_(~mask & (values == lowest), limit)
    return limit


def _next_below(value: Tensor) -> Tensor:
    return torch.nextafter(value, value.new_tensor(-torch.inf))
