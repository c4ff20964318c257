"""Models that have no ONNX file of the asked kind are refused before they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from compressft.anatomy import family_of
from compressft.errors import UserError
from compressft.export.cache import has_cache
from compressft.export.rotary import BY_LENGTH, mixed_lengths
from compressft.recipe import Recipe

WITHOUT = "set export.cache to false for a file that scores texts, or export.enabled to false to ship model/ alone"


def refuse_model(recipe: Recipe, model: nn.Module) -> None:
    """Say what a recipe's export cannot do with its model.

    Raises:
        UserError: what, why, and what can be done instead.
    """
    if not recipe.export.enabled:
        return
    reason = no_cache(model) if has_cache(recipe) else None
    if reason is not None:
        raise UserError(f"export.cache: {reason}; {WITHOUT}")


def refuse_lengths(recipe: Recipe, model: nn.Module, lengths: Callable[[], Sequence[int]]) -> None:
    """Refuse rows that an exported file, or torch itself, treats otherwise in another batch.

    Args:
        lengths: gives those of all rows; called where they matter.

    Raises:
        UserError: there are such rows.
    """
    config: Any = model.config
    if recipe.export.enabled and (getattr(config, "rope_parameters", None) or {}).get("rope_type") in BY_LENGTH:
        reason = mixed_lengths(config, lengths())
        if reason is not None:
            raise UserError(reason)


def no_cache(model: nn.Module) -> str | None:
    """Why a language model's file cannot have a key/value cache; None where it can."""
    config: Any = model.config
    family = family_of(model)
    if not family.causal or family.decoder is not None:
        return f"{config.model_type} counts places its own way, as an encoder does, and its file goes without a cache"
    if getattr(config, "add_cross_attention", False):
        return f"a {config.model_type} with cross-attention wants an encoder's states beside the cache"
    return None
