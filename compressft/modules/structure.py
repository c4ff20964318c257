"""Describe which of our modules sit where in a model, and put them back: what a saved folder needs besides tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from compressft.errors import UserError

# Importing them makes them known.
from compressft.modules import (  # noqa: F401
    bottleneck,
    embedding,
    fusion,
    head,
    invertible,
    ladder,
    lsh,
    prefix,
    quantizer,
    scalar_mix,
    side,
    tuner,
)
from compressft.modules.kinds import KINDS
from compressft.modules.linear import CompressedLinear
from compressft.utils.texts import JSON


def describe(model: nn.Module) -> dict[str, dict[str, JSON]]:
    """Module path -> {"kind", ...} for every module of ours, outer ones first; gates must be folded.

    Raises:
        ValueError: gates, a delta of no known kind or a packed weight are still in place.
    """
    table: dict[str, dict[str, JSON]] = {}
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            _check_settled(path, module)
        name = getattr(type(module), "kind", None)
        if name in KINDS and isinstance(module, KINDS[name]):
            table[path] = {"kind": name, **module.describe()}
    return table


def _check_settled(path: str, linear: CompressedLinear) -> None:
    if len(linear.gates) or not (linear.delta is None or getattr(type(linear.delta), "kind", None) in KINDS):
        raise ValueError(f"{path}: gates or delta are not folded; call the transforms' finalize first")
    if linear.store is not None:
        raise ValueError(f"{path}: the weight is still packed; call the transforms' finalize first")


def rebuild(model: nn.Module, table: dict[str, dict[str, JSON]], who: str = "modules") -> None:
    """Put the described modules into a plain model of the right shapes; their tensors are loaded afterwards.

    Args:
        who: what says so, for messages.

    Raises:
        UserError: an unknown kind, or one that does not fit where it is said to be.
    """
    for path, entry in sorted(_flat(table).items(), key=lambda item: item[0].count(".")):
        arguments = dict(entry)
        kind = str(arguments.pop("kind"))
        if kind not in KINDS:
            raise UserError(f"{who}: {path}: unknown kind {kind!r}; this folder was written by a newer compressft")
        try:
            _put(model, path, kind, arguments)
        except UserError:
            raise
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{who}: {path}: a {kind!r} of these fields does not fit there ({reason}); restore the file"
            ) from error


def _put(model: nn.Module, path: str, kind: str, arguments: Mapping[str, JSON]) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    new = KINDS[kind].rebuild(getattr(owner, name, None), arguments)
    setattr(owner, name, new)
    attach = getattr(new, "attach", None)
    if attach is not None:
        attach(owner)


def _flat(table: dict[str, dict[str, JSON]]) -> dict[str, dict[str, JSON]]:
    """Older folders describe a layer's slots inside the layer's own entry."""
    flat: dict[str, dict[str, JSON]] = {}
    for path, entry in table.items():
        flat[path] = {key: value for key, value in entry.items() if key not in ("quantizer", "adapter")}
        for slot, kind in (("quantizer", "int8"), ("adapter", "bottleneck")):
            if slot in entry:
                fields = entry[slot]
                assert isinstance(fields, dict)
                flat[f"{path}.{slot}"] = {"kind": kind, **fields}
    return flat
