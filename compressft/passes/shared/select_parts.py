"""Which parts live, given their importance and a budget: pure functions of scores, one per kind of part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def keep_equally(scores: Sequence[Tensor], kept: float, align: int, floor: int) -> list[Tensor]:
    """The same number of groups per layer; ascending indices of the highest scores."""
    smallest = min(len(score) for score in scores)
    number = aligned(kept * smallest, align, floor, smallest)
    return [top(score, number) for score in scores]


def keep_globally(scores: Sequence[Tensor], kept: float, align: int, floor: int) -> list[Tensor]:
    """Spend one budget over all layers where the importance is; per-layer counts are multiples of `align`.

    Scores are normalised per layer to unit L2 norm (Michel et al. 2019). Each layer is cut into blocks of `align`
    neurons in descending order; the blocks with the highest means are kept, after every layer has its floor. A layer
    whose size is no multiple of `align` ends in a smaller block, and may so be kept whole.
    """
    sizes = [len(score) for score in scores]
    minimum = [aligned(0, align, floor, size) for size in sizes]
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
    return [top(score, number) for score, number in zip(scores, numbers, strict=True)]


def keep_layers(scores: Tensor, kept: float) -> Tensor:
    """The most important layers (depth,), at least one; `kept` is the fraction that stays."""
    return top(scores, aligned(kept * len(scores), 1, 1, len(scores)))


def keep_hidden(score: Tensor, kept: float, align: int) -> Tensor:
    """The most important dimensions of the residual stream (width,), a multiple of `align` of them (or all)."""
    return top(score, aligned(kept * len(score), align, align, len(score)))


def keep_expected(probabilities: Sequence[Tensor], align: int, floor: int, uniform: bool) -> list[Tensor]:
    """The likeliest groups, as many as the gates expect to be open: sum P(open) per layer (`uniform`: the mean).

    CoFi's rule (number of zeros = round(size - sum P)), with the number rounded to `align`.
    """
    expected = [float(p.sum()) for p in probabilities]
    if uniform:
        expected = [sum(expected) / len(expected)] * len(expected)
    return [top(p, aligned(e, align, floor, len(p))) for p, e in zip(probabilities, expected, strict=True)]


def aligned(number: float, align: int, floor: int, size: int) -> int:
    """Nearest of `size` and the multiples of `align` below it that is at least `floor` (rounded up to a multiple)."""
    low = -(-floor // align) * align
    nearest = round(number / align) * align
    if abs(size - number) < abs(nearest - number):
        nearest = size
    return min(max(nearest, low), size)


def top(score: Tensor, number: int) -> Tensor:
    """Ascending indices of the highest scores; of equal ones the first."""
    return score.sort(descending=True, stable=True).indices[:number].sort().values


@dataclass(frozen=True)
class Alive:
    """Open probabilities, or masks of 0 and 1, of a model's parts.

    Attributes:
        heads, ffn: per layer, per KV group or neuron.
        layers: (depth,).
        hidden: (width,).
    """

    heads: Sequence[Tensor]
    ffn: Sequence[Tensor]
    layers: Tensor
    hidden: Tensor


def encoder_sparsity(alive: Alive, head_cost: Sequence[int], ffn_cost: Sequence[int]) -> Tensor:
    """Fraction of the layers' matrices that is gone.

    A weight lives if its head or neuron, its layer and its hidden dimension do; gates are independent, so that the
    expectation of the product is the product of the probabilities (CoFi, section 3.1).

    Args:
        head_cost, ffn_cost: per layer, weights of one KV group (or neuron) per hidden dimension.
    """
    heads, ffn, layers, hidden = alive.heads, alive.ffn, alive.layers, alive.hidden
    inside = torch.stack(
        [h.sum() * hc + f.sum() * fc for h, f, hc, fc in zip(heads, ffn, head_cost, ffn_cost, strict=True)]
    )
    total = sum(
        (len(h) * hc + len(f) * fc for h, f, hc, fc in zip(heads, ffn, head_cost, ffn_cost, strict=True)), start=0
    )
    return 1.0 - (layers * inside).sum() * hidden.sum() / (total * len(hidden))
