"""Give a model another task's head: the backbone stays, with all that was done to it."""

from __future__ import annotations

import torch
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import Anatomy, anatomy
from compressft.model.embedder import POOLING
from compressft.modules.pretrained import pretrained

# What a configuration says of a head.
OF_THE_HEAD = ("id2label", "label2id", "problem_type", "architectures", POOLING)


@torch.no_grad()
def with_head(model: nn.Module, donor: nn.Module, who: str) -> nn.Module:
    """A model of `donor`'s class that has the backbone of `model` and the donor's head.

    A pooler goes on with the backbone; where only one of the two has one, the donor decides.

    Args:
        model: gives its backbone away, and is not to be used afterwards.
        donor: a model of the same base, of the class that the new task wants.
        who: begins the message.

    Raises:
        UserError: the donor's head does not fit the backbone as it is now.
    """
    old, new = _both(model, donor, who)
    backbone, theirs = old.backbone, new.backbone
    pooler = old.family.pooler
    if pooler is not None and (getattr(backbone, pooler, None) is None) != (getattr(theirs, pooler, None) is None):
        setattr(backbone, pooler, getattr(theirs, pooler, None))
    config = backbone.config
    for name in OF_THE_HEAD:
        if hasattr(config, name) or hasattr(donor.config, name):
            setattr(config, name, getattr(pretrained(donor).config, name, None))
    device = next(model.parameters()).device
    setattr(donor, new.prefix, backbone)
    pretrained(donor).config = config
    _retie(donor, who)
    return donor.to(device)


@torch.no_grad()
def over(model: nn.Module, donor: nn.Module, who: str) -> nn.Module:
    """The donor with the backbone of `model`, which keeps it: another head over the very same modules.

    Raises:
        UserError: as `with_head`; or the donor's head reads a pooler that the model has not.
    """
    old, new = _both(model, donor, who)
    pooler = old.family.pooler
    if pooler is not None and getattr(old.backbone, pooler, None) is None and getattr(new.backbone, pooler, None):
        raise UserError(f"{who}: its head reads the pooler, which the first feed's model has not; put this feed first")
    setattr(donor, new.prefix, old.backbone)
    _retie(donor, who)
    return donor


def _both(model: nn.Module, donor: nn.Module, who: str) -> tuple[Anatomy, Anatomy]:
    old, new = anatomy(model), anatomy(donor)
    if not old.prefix or not new.prefix:
        raise UserError(
            f"{who}: a {type(model).__name__} has no head that could be exchanged; give its stages one task"
        )
    if old.width != new.width:
        raise UserError(f"{who}: its head is for a width of {new.width}, and the model's is {old.width} by now")
    return old, new


def _retie(donor: nn.Module, who: str) -> None:
    """Tie a language model's output layer to the backbone's table again."""
    model = pretrained(donor)
    out = model.get_output_embeddings()
    if out is None:
        return
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding) and isinstance(out, nn.Linear)
    rows, has = table.weight.shape[0], out.weight.shape[0]
    if has != rows:
        raise UserError(
            f"{who}: its output layer has {has} pieces, and the vocabulary {rows} by now; cut the "
            "vocabulary in a later stage"
        )
    model.tie_weights()
