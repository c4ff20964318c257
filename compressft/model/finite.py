"""Numbers that are none: which weight or loss term stopped being one, and whose fault that is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressft.errors import UserError


def broken_weight(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity, here; None where all are finite."""
    for name, parameter in model.named_parameters():
        # Others may not be asking: of what is in pieces, this process's own.
        own = getattr(parameter, "to_local", None)
        local: Tensor = parameter.detach() if own is None else own().detach()
        if local.is_floating_point() and not torch.isfinite(local).all():
            return name
    return None


def refuse_broken(model: nn.Module, name: str) -> None:
    """Refuse a model that was no model when it came.

    Raises:
        UserError: a weight is not finite.
    """
    broken = broken_weight(model)
    if broken is not None:
        raise UserError(f"model: {name!r} holds a NaN or an infinity in {broken}; save its weights anew")


def refuse_update(model: nn.Module, step: int, rate: float, decay: float) -> None:
    """Say that an update, not the loss, left weights that are no numbers.

    Args:
        step: the last that was made; 0 before the first.
        rate: the learning rate.
        decay: the weight decay.

    Raises:
        UserError: a weight is not finite.
    """
    broken = broken_weight(model)
    if broken is not None and not step:
        raise UserError(f"train: {broken} holds a NaN or an infinity before the first step")
    if broken is not None:
        raise UserError(
            f"train: the update of step {step} left a NaN or an infinity in {broken}; lower train.learning_rate "
            f"(now {rate:g}) or train.weight_decay (now {decay:g})"
        )


def broken_term(terms: Mapping[str, Tensor]) -> tuple[str, float] | None:
    """The first term of a loss that is not finite, by name, and its value."""
    for name, term in terms.items():
        value = float(term.detach())
        if value != value or value in (float("inf"), float("-inf")):
            return name, value
    return None
