"""Modules of ours that a saved folder must know: each kind describes itself and is put back where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, TypeVar

from torch import nn

from compressft.utils.texts import JSON


class Kind(Protocol):
    """What `structure` asks of a module class that it is to find again in a saved folder.

    `describe` gives JSON values, without tensors. `rebuild` makes the module for one description; its tensors are
    loaded afterwards. `old` is what stands in its place in the plain model: a layer that it takes over, or None where
    it is an addition. A kind that has to know the module it stands in has a method `attach(owner)` besides, which is
    called last. Describing and rebuilding go from the outside to the inside, each module for itself alone.
    """

    kind: ClassVar[str]

    def describe(self) -> dict[str, JSON]: ...

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> nn.Module: ...


KINDS: dict[str, type[Kind]] = {}
Class = TypeVar("Class", bound=type)
Built = TypeVar("Built")


def known(cls: Class) -> Class:
    """Class decorator: saved folders may hold this kind of module, under the name `cls.kind`."""
    taken = KINDS.setdefault(cls.kind, cls)
    assert taken.__qualname__ == cls.__qualname__, f"kind {cls.kind!r} is taken by {taken.__qualname__}"
    KINDS[cls.kind] = cls
    return cls


def built(make: Callable[..., Built], entry: Mapping[str, JSON], **others: object) -> Built:
    """`make` of what a folder says its arguments are, and of these; it raises TypeError where they are not."""
    return make(**entry, **others)


class Extra(nn.Module):
    """Base of modules all of whose tensors are additions: the plain model has none of them."""

    kind: ClassVar[str]

    def describe(self) -> dict[str, JSON]:
        """The constructor's keyword arguments, JSON values."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> nn.Module:
        """The module again, its tensors still to be loaded."""
        return built(cls, entry)


def additions(model: nn.Module) -> tuple[str, ...]:
    """Prefixes ("a.b.") of the names of all tensors below Extra modules."""
    return tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Extra))
