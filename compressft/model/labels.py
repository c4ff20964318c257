"""Labels by name: a checkpoint's outputs are matched with the task's labels by what they are called, not where."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.modules.pretrained import pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def names_of(config: PretrainedConfig) -> tuple[str, ...] | None:
    """What a configuration calls its outputs, in their order; None where it has only the library's own LABEL_0, ..."""
    named = getattr(config, "id2label", None)
    if not isinstance(named, dict) or not named:
        return None
    names = tuple(str(named[key]) for key in sorted(named, key=int))
    return None if all(name.startswith("LABEL_") for name in names) else names


def in_order_of(labels: Sequence[str], config: PretrainedConfig) -> tuple[str, ...]:
    """The labels in the order of a checkpoint that has just these, so that its head goes on; else as they are."""
    names = names_of(config)
    return names if names is not None and sorted(names) == sorted(labels) else tuple(labels)


def refuse_alike(labels: Sequence[str]) -> None:
    """Refuse labels that are two by an accident of writing: one number with and without a fraction, blanks around one.

    A column of whole numbers with a gap is often written as fractions, in one file of several.

    Raises:
        UserError: two labels are one.
    """
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(_bare(label), label)
        if other != label:
            raise UserError(f"data: labels {other!r} and {label!r} are one label written in two ways; write them alike")


def _bare(label: str) -> str:
    text = " ".join(label.split())
    return str(int(float(text))) if re.fullmatch(r"[+-]?(0|[1-9]\d{0,14})(\.0*)?", text) else text


def other_labels(config: PretrainedConfig, labels: Sequence[str]) -> bool:
    """Whether a checkpoint's head, if it has one, answers for other labels than these."""
    names = names_of(config)
    return names is not None and sorted(names) != sorted(labels)


def head_layers(model: nn.Module) -> list[nn.Module]:
    """The leaf modules behind the backbone."""
    prefix = anatomy(model).prefix
    return [
        module
        for name, module in model.named_modules()
        if prefix and not f"{name}.".startswith(f"{prefix}.") and name and not any(module.children())
    ]


def renew_head(model: PreTrainedModel) -> None:
    """Draw the head again: what it has learnt was for other labels."""
    for module in head_layers(model):
        # Else the library takes it for loaded.
        for one in (module, *module.parameters()):
            if hasattr(one, "_is_hf_initialized"):
                delattr(one, "_is_hf_initialized")
        model._init_weights(module)


def reorder(model: nn.Module, labels: Sequence[str], who: str) -> None:
    """Put a teacher's outputs into the order of the task's labels.

    Args:
        who: begins the message.

    Raises:
        UserError: its labels are others, or no layer gives one output a label.
    """
    config = pretrained(model).config
    names = names_of(config)
    if names is None or names == tuple(labels):
        return
    if sorted(names) != sorted(labels):
        lacking = sorted(set(labels) - set(names)) or sorted(set(names) - set(labels))
        raise UserError(
            f"{who} was trained for other labels ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); "
            f"{lacking[0]!r} is on one side alone"
        )
    rows = torch.tensor([names.index(label) for label in labels])
    last = [m for m in head_layers(model) if isinstance(m, nn.Linear) and m.out_features == len(names)]
    if not last:
        raise UserError(f"{who} has its labels in another order ({', '.join(names)}), and no layer to reorder them by")
    with torch.no_grad():
        for parameter in last[-1].parameters():
            parameter.copy_(parameter[rows])
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
