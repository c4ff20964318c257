"""How sparse learned gates make a model: expected while they are noisy, and chosen when they are fixed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compressft.modules.concrete import open_probability
from compressft.modules.concrete_gate import ConcreteGate
from compressft.passes.shared.parts import Parts
from compressft.passes.shared.select_parts import aligned, keep_expected, keep_layers, top

# Bisection for the shift of all log_alpha that meets the target: range and halvings.
WIDEST_SHIFT = 16.0
HALVINGS = 24


class Rounding(Protocol):
    """What the pass says about the numbers of parts."""

    align: int
    align_hidden: int
    floor_heads: int
    floor_ffn: int
    uniform: bool


def expected_sparsity(parts: Parts) -> Tensor:
    """Expected fraction of the layers' matrices that is gone; differentiable in the gates."""
    return parts.measured([gate.probability() for gate in parts.concrete()])


@torch.no_grad()
def settle(parts: Parts, rounding: Rounding, target: float | None) -> None:
    """Fix every gate's deployed factors: the likeliest groups live, as many as the gates expect.

    Args:
        target: where given, all gates are first moved by one number so that the sparsity is the nearest to it that
            the rounding allows: training ends near its constraint, not on it.
    """
    if target is None:
        _choose(parts, rounding, 0.0)
        return
    _choose(parts, rounding, _shift(parts, rounding, target))
    if parts.layers and (parts.heads or parts.ffn or parts.hidden is not None):
        # Whole layers are coarse: with them fixed, the others come nearer.
        _choose(parts, rounding, _shift(parts, rounding, target, layers=False), layers=False)


def _shift(parts: Parts, rounding: Rounding, target: float, layers: bool = True) -> float:
    """What to add to every log_alpha for the sparsity nearest to the target; of equally good numbers the smallest."""
    low, high = -WIDEST_SHIFT, WIDEST_SHIFT
    tried: dict[float, float] = {}
    for shift in (0.0, *[None] * HALVINGS):
        shift = (low + high) / 2 if shift is None else shift
        _choose(parts, rounding, shift, layers)
        tried[shift] = float(parts.sparsity())
        low, high = (shift, high) if tried[shift] > target else (low, shift)
    return min(tried, key=lambda s: (round(abs(tried[s] - target), 6), abs(s)))


def _choose(parts: Parts, rounding: Rounding, shift: float, layers: bool = True) -> None:
    def open_now(gates: list[ConcreteGate]) -> list[Tensor]:
        return [open_probability(gate.log_alpha + shift) for gate in gates]

    if parts.layers and layers:
        likely = torch.cat(open_now(parts.layers))  # type: ignore[arg-type]
        kept = keep_layers(likely, float(likely.mean())).tolist()
        for index, gate in enumerate(parts.layers):
            gate.settle(torch.arange(1)[: int(index in kept)], binary=True)  # type: ignore[attr-defined]
    for gates, align, floor in (
        (parts.heads, 1, rounding.floor_heads),
        (parts.ffn, rounding.align, rounding.floor_ffn),
    ):
        if gates:
            chosen = keep_expected(open_now(gates), align, floor, rounding.uniform)  # type: ignore[arg-type]
            for gate, groups in zip(gates, chosen, strict=True):
                gate.settle(groups)  # type: ignore[attr-defined]
    if parts.hidden is not None:
        (likely,) = open_now([parts.hidden])  # type: ignore[list-item]
        number = aligned(float(likely.sum()), rounding.align_hidden, rounding.align_hidden, len(likely))
        parts.hidden.settle(top(likely, number))  # type: ignore[attr-defined]
