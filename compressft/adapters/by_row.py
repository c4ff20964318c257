"""One batch through several models: each row through its own, the results put together in the batch's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.modules.pretrained import Generates, generating, pretrained
from compressft.tasks.task import IGNORE

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


def mixed_forward(
    names: Sequence[str], models: Mapping[str, nn.Module], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> ModelOutput:
    """`logits` of each row from the model of its name, and the whole batch's mean `loss` where there are labels.

    Args:
        names: one for each row.
        models: by name.
        args, kwargs: of the models' forward; tensors whose first dimension is the batch are split.

    Raises:
        UserError: an unknown name, another number of names than rows, a cache, a model without logits, or logits of
            shapes that do not go together.
    """
    from transformers.utils.generic import ModelOutput

    if kwargs.get("past_key_values") is not None:
        raise UserError("adapter_names: a key/value cache is of one method; call generate with adapter_names")
    logits: Tensor | None = None
    losses: list[Tensor] = []
    weights: list[int] = []
    for name, where, part in _parts(names, models, args, kwargs):
        model = models[name]
        own: dict[str, object] = {key: part(value) for key, value in kwargs.items()} | {"return_dict": True}
        out = model(*(part(value) for value in args), **own)
        if getattr(out, "logits", None) is None:
            raise UserError(f"adapter_names: a {type(model).__name__} gives no logits to put together")
        found: Tensor = out.logits
        if logits is not None and logits.shape[1:] != found.shape[1:]:
            raise UserError(f"adapter_names: the heads of {names[0]!r} and {name!r} give logits of other shapes")
        whole = found.new_zeros(len(names), *found.shape[1:]) if logits is None else logits
        logits = whole.index_copy(0, where, found)
        counted = _counted(model, own.get("labels"))
        if counted:
            losses.append(out.loss)
            weights.append(counted)
    if not losses:
        return ModelOutput(logits=logits)
    total = torch.stack([loss * (weight / sum(weights)) for loss, weight in zip(losses, weights, strict=True)])
    return ModelOutput(loss=total.sum(), logits=logits)


def mixed_generate(
    names: Sequence[str], models: Mapping[str, nn.Module], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Tensor:
    """Each row's continuation by the model of its name, (rows x sequences of each, tokens), int64; short ones padded.

    Args as `mixed_forward`, of the models' `generate`.

    Raises:
        UserError: as `mixed_forward`; something else than token ids is asked for.
    """
    if kwargs.get("return_dict_in_generate") or kwargs.get("streamer") is not None:
        raise UserError(
            "adapter_names: rows of several adapters come back as token ids alone; leave return_dict_in_generate and "
            "streamer out"
        )
    found: list[Tensor] = []
    places: list[Tensor] = []
    padding = 0
    for name, where, part in _parts(names, models, args, kwargs):
        model = generating(models[name])
        ids = model.generate(*(part(value) for value in args), **{key: part(value) for key, value in kwargs.items()})
        assert isinstance(ids, Tensor)
        of_each = ids.shape[0] // len(where)
        found.append(ids)
        places.append((where[:, None] * of_each + torch.arange(of_each, device=where.device)).flatten())
        padding = _padding(model, kwargs)
    longest = max(ids.shape[1] for ids in found)
    padded = [torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=padding) for ids in found]
    return torch.cat(padded)[torch.cat(places).argsort()]


def _padding(model: Generates, kwargs: Mapping[str, object]) -> int:
    """The id behind a finished sequence, by `generate`'s own order: what is asked for, then the end of a text."""
    settings = kwargs.get("generation_config") or model.generation_config
    for field in ("pad_token_id", "eos_token_id"):
        value = kwargs.get(field)
        value = getattr(settings, field) if value is None else value
        first = value[0] if isinstance(value, list | tuple) else value
        if first is not None:
            assert isinstance(first, int | Tensor)
            return int(first)
    return 0


def _parts(
    names: Sequence[str], models: Mapping[str, nn.Module], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> Iterator[tuple[str, Tensor, Callable[[object], object]]]:
    """Each name once, the indices of its rows, and what cuts them out of an argument."""
    unknown = sorted(set(names) - set(models))
    if unknown:
        raise UserError(f"adapter_names: {unknown[0]!r} is not there; there are {', '.join(models)}")
    rows = len(names)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if not given or given[0].shape[0] != rows:
        raise UserError(f"adapter_names: {rows} names for a batch of {given[0].shape[0] if given else 0} rows")
    for name in dict.fromkeys(names):
        where = torch.tensor([i for i, other in enumerate(names) if other == name], device=given[0].device)

        def part(value: object, where: Tensor = where) -> object:
            return value[where] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value

        yield name, where, part


def _counted(model: nn.Module, labels: object) -> int:
    """How many labels a mean loss is over: what the model leaves out is -100, and a language model's first token."""
    if not isinstance(labels, Tensor):
        return 0
    if labels.is_floating_point():
        return labels.numel()
    shifted = anatomy(model).family.causal and pretrained(model).get_output_embeddings() is not None
    return int((labels[:, 1:] if shifted and labels.dim() > 1 else labels).ne(IGNORE).sum())
