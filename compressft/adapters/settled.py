"""A model after its method, next to the base it stands on: what every format reads and writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.saved.state import plain_state
from compressft.model.source import SHIPPED, resolve
from compressft.model.surgery import head_parameters
from compressft.modules.kinds import KINDS
from compressft.modules.linear import CompressedLinear
from compressft.modules.structure import rebuild
from compressft.transform import Transform
from compressft.utils.texts import JSON

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Settled:
    """What a method made of a base.

    Attributes:
        model: the model after the method's `finalize`.
        plain: the base it was made on, without anything of ours in it; nothing changes it.
        method: the method's fields; None where a folder does not say them.
        head: names of the task head's tensors that are this method's own, whatever the base's head holds.
    """

    model: nn.Module
    plain: nn.Module
    method: Transform | None
    head: frozenset[str]

    @cached_property
    def base(self) -> dict[str, Tensor]:
        """The base's tensors by name."""
        return plain_state(self.plain)[0]

    @cached_property
    def changed(self) -> dict[str, Tensor]:
        """The tensors that make this of the base: those it lacks, or has with other values, and the head's own."""
        plain, extra = plain_state(self.model)
        return {
            name: tensor
            for name, tensor in (plain | extra).items()
            if name in self.head
            or name not in self.base
            or self.base[name].shape != tensor.shape
            or not torch.equal(self.base[name], tensor)
        }

    @cached_property
    def ours(self) -> dict[str, nn.Module]:
        """Modules of ours in the model by path; layers whose slots are empty are none."""
        return {
            path: module
            for path, module in self.model.named_modules()
            if getattr(type(module), "kind", None) in KINDS and not isinstance(module, CompressedLinear)
        }


def shared_copy(model: Module) -> Module:
    """Another tree of the same modules over the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def own_what_is_trained(tree: nn.Module, base: nn.Module) -> None:
    """Give the tree copies of the base's tensors that it trains or writes to; the base's stay frozen."""
    shared = {id(parameter) for parameter in base.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in tree.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared and parameter.requires_grad:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
                setattr(module, name, copies[id(parameter)])


def own_head(tree: nn.Module, plain: nn.Module) -> frozenset[str]:
    """Names of the tensors of a tree's task head that it does not share with its base, or masks.

    A masked head is a random one: another loading of the base draws other values.
    """
    shared = {parameter.data_ptr() for parameter in plain.parameters()}
    head = [(name, tensor) for name, tensor in head_parameters(tree) if ".gates." not in name]
    outside = [name for name, _ in head if not of_backbone(tree, name)]
    owners = [tree.get_submodule(name.rpartition(".")[0]) for name in outside]
    masked = outside if any(isinstance(owner, CompressedLinear) and len(owner.gates) for owner in owners) else []
    own = [name for name, tensor in head if tensor.data_ptr() not in shared]
    return frozenset([*own, *masked])


def of_backbone(model: nn.Module, name: str) -> bool:
    """Whether a tensor of this name is the backbone's; all of a model's that has no head."""
    prefix = anatomy(model).prefix
    return not prefix or name.startswith(f"{prefix}.")


def origin(model: nn.Module) -> str:
    """What a model was loaded from, as a recipe may say it; "" where it was not."""
    name = str(getattr(model, "name_or_path", "") or "")
    for shipped in SHIPPED:
        with suppress(UserError):
            if name == resolve(shipped):
                return shipped
    return name


def put(tree: nn.Module, modules: Mapping[str, dict[str, JSON]], tensors: Mapping[str, Tensor], who: str) -> None:
    """Rebuild modules in a tree that shares its tensors with a base, and give it these tensors as its own.

    Args:
        modules: as `compressft.modules.structure.describe` gives them.
        tensors: by the names that `plain_state` gives; what the base has already may be left out.

    Raises:
        UserError: a tensor has no place or another shape, or one that the base lacks is not given.
    """
    known = {name.replace(".inner.", ".") for name in tree.state_dict()}
    rebuild(tree, dict(modules), who)
    transposed = {f"{p}.weight" for p, m in tree.named_modules() if isinstance(m, CompressedLinear) and m.transposed}
    places: dict[str, list[str]] = {}
    twins: dict[int, list[str]] = {}
    for path, tensor in tree.state_dict(keep_vars=True).items():
        # Tied tensors go by their first name.
        twins.setdefault(id(tensor), []).append(path)
    for paths in twins.values():
        for path in paths:
            places[path.replace(".inner.", ".")] = paths
    for name, value in tensors.items():
        if name not in places:
            raise UserError(f"{who}: tensor {name!r} has no place in this {type(tree).__name__}")
        paths = places[name]
        old = _at(tree, paths[0])
        new = value.t() if paths[0] in transposed else value
        if new.shape != old.shape:
            raise UserError(f"{who}: tensor {name!r} has shape {tuple(new.shape)}, the model's has {tuple(old.shape)}")
        new = new.to(device=old.device, dtype=old.dtype).clone().contiguous()
        new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for path in paths:
            owner, _, attribute = path.rpartition(".")
            setattr(tree.get_submodule(owner), attribute, new)
    for name, paths in places.items():
        if name not in known and not any(p.replace(".inner.", ".") in tensors for p in paths):
            raise UserError(f"{who}: tensor {name!r} is missing")
    tree.requires_grad_(False)


def _at(tree: nn.Module, path: str) -> Tensor:
    owner, _, attribute = path.rpartition(".")
    return getattr(tree.get_submodule(owner), attribute)


@torch.no_grad()
def continue_from(tree: nn.Module, saved: nn.Module, base: nn.Module, method: Transform) -> None:
    """Copy a saved adapter's tensors into a newly prepared tree.

    Raises:
        UserError: what is trained is not what was saved.
    """
    target, source = tree.state_dict(), saved.state_dict()
    if {name: t.shape for name, t in target.items()} != {name: t.shape for name, t in source.items()}:
        raise UserError(
            f"is_trainable: method {method.type} ships as something else than it trains; "
            "resume its Trainer's checkpoint, or load it without is_trainable"
        )
    shared = {tensor.data_ptr() for tensor in (*base.parameters(), *base.buffers())}
    for name, tensor in target.items():
        if tensor.data_ptr() not in shared:
            tensor.copy_(source[name])
