"""Methods on a model from Python: named adapters on one base, switched, disabled, merged, or one for each row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressft.errors import UserError, nearest
from compressft.methods import METHODS
from compressft.model import count, restore_plain
from compressft.modules.kinds import Extra
from compressft.modules.linear import CompressedLinear
from compressft.transform import Context, Transform

BASE = "__base__"


class Adapted(nn.Module):
    """A base model and named methods on it, one of which is active.

    Each name has a tree of modules of its own whose frozen tensors are the base's own: an adapter costs what it adds or
    trains. Calls and unknown attributes (`config`, `generate`, ...) go to the active tree.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model = base.requires_grad_(False)
        self.trees = nn.ModuleDict()
        self.methods: dict[str, Transform] = {}
        self.active: str | None = None

    @property
    def model(self) -> Any:
        """The active tree; the base itself where none is active."""
        return self.base_model if self.active is None else self.trees[self.active]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "trees", "active"):
                raise
            return getattr(self.model, name)

    def add_adapter(self, name: str, method: Transform | Mapping[str, Any] | str, seed: int = 0) -> None:
        """Prepare another method on the base under a new name, and make it the active one.

        Raises:
            UserError: the name is taken or has a dot; the method does not fit the model.
        """
        if name in self.trees or name == BASE:
            raise UserError(f"adapter {name!r}: the name is taken; taken: {', '.join([*self.trees, BASE])}")
        if not name or "." in name:
            raise UserError(f"adapter {name!r}: wants a name without dots")
        method = as_method(method)
        tree = shared_copy(self.base_model)
        method.prepare(tree, Context((method,), seed=seed))
        own_what_is_trained(tree, self.base_model)
        self.trees[name], self.methods[name] = tree.train(self.training), method
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Make this one active; the others' parameters stay as they are.

        Raises:
            UserError: an unknown name.
        """
        self._check(name)
        self.active = name

    def _check(self, name: str) -> None:
        if name not in self.trees:
            raise UserError(
                f"adapter {name!r} is not there; there are {', '.join(self.trees)}{nearest(name, self.trees)}"
            )

    def delete_adapter(self, name: str) -> None:
        """Forget one; where it was the active one, the base is what runs.

        Raises:
            UserError: an unknown name.
        """
        self._check(name)
        del self.trees[name], self.methods[name]
        if self.active == name:
            self.active = None

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the base runs."""
        before, self.active = self.active, None
        try:
            yield
        finally:
            self.active = before

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The active tree's output.

        Args:
            adapter_names: one name for each row of the batch ("__base__" for none): every row gets its own method's
                logits, and `loss` is the mean over the rows. Tensors whose first dimension is the batch are split.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        return self._mixed(adapter_names, args, kwargs)

    def _mixed(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from transformers.utils import ModelOutput  # type: ignore[attr-defined]

        unknown = sorted(set(names) - set(self.trees) - {BASE})
        if unknown:
            raise UserError(f"adapter_names: {unknown[0]!r} is not there; there are {', '.join([*self.trees, BASE])}")
        rows = len(names)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or given[0].shape[0] != rows:
            raise UserError(f"adapter_names: {rows} names for a batch of {given[0].shape[0] if given else 0} rows")
        logits: Tensor | None = None
        loss: Tensor | None = None
        for name in dict.fromkeys(names):
            where = torch.tensor([i for i, other in enumerate(names) if other == name], device=given[0].device)

            def part(value: Any, where: Tensor = where) -> Any:
                return value[where] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value

            tree = self.base_model if name == BASE else self.trees[name]
            out = tree(*map(part, args), **{key: part(value) for key, value in kwargs.items()})
            if logits is None:
                logits = out.logits.new_empty(rows, *out.logits.shape[1:])
            elif logits.shape[1:] != out.logits.shape[1:]:
                raise UserError(f"adapter_names: the heads of {names[0]!r} and {name!r} give logits of other shapes")
            assert logits is not None
            logits = logits.index_copy(0, where, out.logits)
            if out.loss is not None:
                share = out.loss * (len(where) / rows)
                loss = share if loss is None else loss + share
        return ModelOutput(logits=logits) if loss is None else ModelOutput(loss=loss, logits=logits)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) values of the active tree."""
        counted = count(self.model)
        return counted["trainable"], counted["total"]

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, as PEFT does."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    @torch.no_grad()
    def merge_and_unload(self) -> Any:
        """The active adapter merged into a copy of the base: a plain transformers model. Nothing here changes.

        Raises:
            UserError: the method adds modules that no weight can hold.
        """
        if self.active is None:
            raise UserError("merge_and_unload: no adapter is active; set_adapter one")
        merged = self.settled()
        for module in merged.modules():
            if isinstance(module, CompressedLinear):
                module.fold()
        left = [path for path, module in merged.named_modules() if isinstance(module, Extra)]
        if left:
            kind = self.methods[self.active].type
            raise UserError(
                f"merge_and_unload: method {kind} adds what no weight can hold ({left[0]} and {len(left) - 1} more); "
                "export keeps it in the graph"
            )
        restore_plain(merged)
        return merged

    def settled(self) -> Any:
        """A copy of the active tree after its method's `finalize`: what ships, every tensor its own."""
        assert self.active is not None
        model = copy.deepcopy(self.trees[self.active]).eval()
        self.methods[self.active].finalize(model)
        return model


def get_model(
    model: nn.Module, method: Transform | Mapping[str, Any] | str, name: str = "default", seed: int = 0
) -> Adapted:
    """Put a method on a model: freeze it, add what is trained.

    Args:
        model: from `load_model` (its attention must be routed through compressft for `prefix`). It is frozen.
        method: a method, its fields as a recipe writes them ({"type": "adapter", "size": 16}), or its name.
        seed: of what the method draws.

    Raises:
        UserError: an unknown method or field, or a method that does not fit the model.
    """
    adapted = Adapted(model)
    adapted.add_adapter(name, method, seed)
    return adapted.train(model.training)


def as_method(value: Transform | Mapping[str, Any] | str) -> Transform:
    """A method from what a recipe may say.

    Raises:
        UserError: an unknown method or field.
    """
    from compressft.recipe import parse_transform

    try:
        return parse_transform(value, METHODS, "method")
    except ValueError as error:
        raise UserError(str(error)) from None


def shared_copy(model: nn.Module) -> Any:
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
    base.requires_grad_(False)
