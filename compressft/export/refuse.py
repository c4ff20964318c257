"""Models that have no ONNX file of the asked kind are refused before they are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.export.cache import has_cache
from compressft.export.rotary import BY_LENGTH, mixed_lengths
from compressft.model.anatomy import anatomy, family_of
from compressft.modules.attention import Attended, Recorder, recording
from compressft.modules.dense_attention import Call
from compressft.modules.pretrained import pretrained
from compressft.recipe.recipe import Recipe

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
    config = pretrained(model).config
    if recipe.export.enabled and (getattr(config, "rope_parameters", None) or {}).get("rope_type") in BY_LENGTH:
        reason = mixed_lengths(config, lengths())
        if reason is not None:
            raise UserError(reason)


# What other attention functions take and the exported node does not; a cap of scores training's own refuses.
MORE = {"s_aux": "has sinks"}


class _Calls(Recorder):
    """Keeps what each attention call is asked besides queries, keys and values, by its module's number."""

    def __init__(self, modules: Mapping[nn.Module, int]) -> None:
        super().__init__(modules)
        self.windows: dict[int, int | None] = {}
        self.more: dict[int, list[str]] = {}

    def take(self, module: nn.Module, call: Call) -> None:
        super().take(module, call)
        number, arguments = self.modules.get(module), {**call.options}
        if number is not None:
            self.windows[number] = call.options.get("sliding_window")
            self.more[number] = [what for name, what in MORE.items() if arguments.get(name) is not None]


@torch.no_grad()
def refuse_attention(recipe: Recipe, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Run a batch and look whether every attention call is one that the exported node can make.

    Args:
        batch: (B, T) of at least two rows and tokens; its last token is hidden, to see how paddings are.

    Raises:
        UserError: one is not.
    """
    if not recipe.export.enabled or family_of(model).decoder is not None:
        return
    layers = anatomy(model).layers
    calls = _Calls({layer.part(layer.family.attention): i for i, layer in enumerate(layers)})
    mask = batch["attention_mask"].clone()
    mask[-1, -1] = 0
    training = model.training
    with recording(calls):
        model.eval()(**{**batch, "attention_mask": mask})
    model.train(training)
    for number, call in calls.taken.items():
        reason = next(iter(calls.more[number]), None) or _other_mask(call, mask, calls.windows[number])
        if reason is not None:
            raise UserError(
                f"export: attention of {layers[number].name} {reason}, for which the exported node has no form; "
                "set export.enabled to false to ship model/"
            )


def _other_mask(call: Attended, padding: Tensor, window: int | None) -> str | None:
    """Whether a call's mask is none of causality, window and paddings, which are what the export path knows."""
    length = call.query.shape[2]
    if call.mask is None or call.mask.shape[-1] != padding.shape[1]:
        return None
    seen = padding.bool()[:, None, None, :].expand(-1, 1, length, -1)
    place = torch.arange(length)
    if call.causal:
        seen = seen & (place[None, :] <= place[:, None])
        if window is not None:
            seen = seen & (place[None, :] > place[:, None] - window)
    given = call.mask if call.mask.dtype == torch.bool else call.mask == 0
    return None if torch.equal(given.expand_as(seen), seen) else "has a mask of its own"


def no_cache(model: nn.Module) -> str | None:
    """Why a language model's file cannot have a key/value cache; None where it can."""
    config = pretrained(model).config
    family = family_of(model)
    if not family.causal or family.decoder is not None:
        return f"{config.model_type} counts places its own way, as an encoder does, and its file goes without a cache"
    if getattr(config, "is_causal", True) is False:
        return f"this {config.model_type} sees later tokens (is_causal: false), whose keys a cache has not"
    if getattr(config, "add_cross_attention", False):
        return f"a {config.model_type} with cross-attention wants an encoder's states next to the cache"
    return None
