"""Methods on a model from Python: named adapters on one base, switched, disabled, merged, or one for each row."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressft.adapters.by_row import mixed_forward, mixed_generate
from compressft.adapters.folders import DEFAULT, named, read, save
from compressft.adapters.settled import Settled, continue_from, own_head, own_what_is_trained, shared_copy
from compressft.errors import UserError, nearest
from compressft.methods import METHODS
from compressft.model.count import count
from compressft.model.surgery import restore_plain
from compressft.modules.kinds import Extra
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained
from compressft.transform import Context, Transform, trainable, ungrouped

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

BASE = "__base__"


class Adapted(nn.Module):
    """A base model and named methods on it, one of which is active.

    Each name has a tree of modules of its own whose frozen tensors are the base's own: an adapter costs what it adds or
    trains. Calls and unknown attributes (`config`, `generate`, ...) go to the active tree. `state_dict()`, and so a
    Trainer's checkpoint, holds what the trees have of their own; `load_state_dict` takes it on the same base.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if isinstance(base, Adapted) or type(base).__module__.startswith("peft."):
            raise UserError(f"get_model: a {type(base).__name__} is no base; give the model in it, or merge it first")
        self.base_model = base.requires_grad_(False)
        self.trees = nn.ModuleDict()
        self.methods: dict[str, Transform] = {}
        self.contexts: dict[str, Context] = {}
        # Loaded as they ship: there is nothing left to finalise.
        self.loaded: set[str] = set()
        self.active: str | None = None
        self.train(base.training)
        self._register_state_dict_hook(_without_the_base)
        self.register_load_state_dict_post_hook(_ignore_the_base)

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

    def add_adapter(self, name: str, method: Transform | Mapping[str, object] | str, seed: int = 0) -> None:
        """Prepare another method on the base under a new name, and make it the active one.

        Raises:
            UserError: the name is taken, or no folder's name; the method does not fit the model.
        """
        self._check_free(name)
        method = as_method(method)
        tree, context = shared_copy(self.base_model), Context((method,), seed=seed)
        try:
            method.prepare(tree, context)
            own_what_is_trained(tree, self.base_model)
        finally:
            # A method that is refused halfway has unfrozen tensors which all trees share.
            self.base_model.requires_grad_(False)
        self.trees[name], self.methods[name], self.contexts[name] = tree.train(self.training), method, context
        self.set_adapter(name)

    def _check_free(self, name: str) -> None:
        if name == BASE or (isinstance(name, str) and name in self.trees):
            raise UserError(f"adapter {name!r}: the name is taken; taken: {', '.join([*self.trees, BASE])}")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
            raise UserError(f"adapter {name!r}: wants a name of letters, digits, _ and -, which becomes a folder's")

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
        self.contexts.pop(name, None)
        self.loaded.discard(name)
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: object,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: object,
    ) -> ModelOutput:
        """The active tree's output; arguments are its own (transformers' Trainer looks for these names).

        Args:
            adapter_names: one name for each row of the batch ("__base__" for none): every row gets its own method's
                logits, and `loss` is the whole batch's, of all its labels. Tensors whose first dimension is the batch
                are split.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
        }
        if args:
            # By position as the tree itself counts.
            args = (named.pop("input_ids"), named.pop("attention_mask"), *args)
        kwargs |= {name: value for name, value in named.items() if value is not None}
        if adapter_names is None:
            return self.model(*args, **kwargs)
        return mixed_forward(adapter_names, self._by_name(), args, kwargs)

    def generate(
        self, *args: object, adapter_names: Sequence[str] | None = None, **kwargs: object
    ) -> Tensor | ModelOutput:
        """What the active tree generates; arguments are transformers' own.

        Args:
            adapter_names: one name for each row ("__base__" for none): every row is continued by its own method. Gives
                token ids (rows x sequences of each, tokens), int64.
        """
        if adapter_names is None:
            return self.model.generate(*args, **kwargs)
        return mixed_generate(adapter_names, self._by_name(), args, kwargs)

    def _by_name(self) -> dict[str, nn.Module]:
        return {**self.trees, BASE: self.base_model}

    def param_groups(self) -> list[dict[str, object]]:
        """What the active method trains, for a torch optimiser: parameters with rates or decay of its own, and others.

        Raises:
            UserError: no adapter is active, or it was loaded as it ships.
        """
        method, context = self._in_training()
        own = method.param_groups(self.model, context)
        others = ungrouped((parameter for _, parameter in trainable(self.model)), own)
        return [*own, *([{"params": others}] if others else [])]

    def loss_terms(self, batch: Mapping[str, Tensor], outputs: object) -> dict[str, Tensor]:
        """What the active method adds to the loss, scalars by name: `outputs` is of `batch`. Errors as `param_groups`.

        Gates and differences that are learned have a penalty, most methods nothing.
        """
        method, context = self._in_training()
        return method.loss(self.model, batch, outputs, context)

    def after_step(self, progress: float) -> None:
        """Let the active method follow training: once with 0 before the first step, then after each optimiser step.

        Schedules and cuts hang on it. Gradients are still there; `progress` ends at 1. Errors as `param_groups`.
        """
        self._in_training()[0].after_step(self.model, progress)

    def _in_training(self) -> tuple[Transform, Context]:
        if self.active is None:
            raise UserError("no adapter is active; set_adapter one")
        if self.active not in self.contexts:
            raise UserError(f"adapter {self.active!r} was loaded as it ships; load it with is_trainable to train it")
        return self.methods[self.active], self.contexts[self.active]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) values of the active tree."""
        counted = count(self.model)
        return counted["trainable"], counted["total"]

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, as PEFT does."""
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    @torch.no_grad()
    def merge_and_unload(self) -> PreTrainedModel:
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
        return pretrained(merged)

    def settled(self, name: str | None = None) -> nn.Module:
        """A copy of a tree (default: the active one) after its method's `finalize`: what ships, all tensors its own."""
        name = self.active if name is None else name
        assert name is not None
        model = copy.deepcopy(self.trees[name]).eval()
        if name not in self.loaded:
            self.methods[name].finalize(model)
        return model

    def save_pretrained(self, directory: str | Path, selected_adapters: Sequence[str] | None = None) -> dict[str, str]:
        """Write each adapter as it ships, with its task's head: "default" into the folder, others into one by its name.

        A folder holds `adapter_config.json`, `adapter_model.safetensors` and a model card. PEFT's tuners and prefixes
        are written as PEFT does, where its format can hold them, so that `peft.PeftModel.from_pretrained` gives the
        same logits.

        Returns:
            the format of each: "peft" or "compressft".

        Raises:
            UserError: there is no adapter, or an unknown name is selected.
        """
        names = list(self.trees) if selected_adapters is None else list(selected_adapters)
        if not names:
            raise UserError("save_pretrained: there is no adapter; add one")
        formats: dict[str, str] = {}
        for name in names:
            self._check(name)
            folder = Path(directory).expanduser()
            head = own_head(self.trees[name], self.base_model)
            result = Settled(self.settled(name), self.base_model, self.methods[name], head)
            formats[name] = save(result, folder if name == DEFAULT else folder / name)
        return formats

    @classmethod
    def from_pretrained(
        cls, base: nn.Module, directory: str | Path, name: str | None = None, is_trainable: bool = False
    ) -> Adapted:
        """Saved adapters on a base.

        Args:
            base: from `load_model`; it is frozen.
            directory: what `load_adapter` takes, or a folder of such folders.
            name: load the adapter in the folder itself under this name. Default: all that `save_pretrained` wrote,
                under their names, the first of them active.
            is_trainable: as for `load_adapter`.

        Raises:
            UserError: as `load_adapter`.
        """
        adapted, folder = cls(base), Path(directory).expanduser()
        if name is not None:
            adapted.load_adapter(folder, name, is_trainable)
            return adapted
        for found, path in named(folder).items():
            adapted.load_adapter(path, found, is_trainable)
        adapted.set_adapter(next(iter(adapted.trees)))
        return adapted

    def load_adapter(self, directory: str | Path, name: str, is_trainable: bool = False) -> None:
        """Put a saved adapter on the base under a new name, and make it the active one.

        Args:
            directory: a folder that `save_pretrained` or `compressft convert` wrote, a run directory or its `delta/`,
                or an adapter saved by PEFT or the `adapters` package.
            is_trainable: go on training it; otherwise it is frozen.

        Raises:
            UserError: it was made on another base; something is missing, damaged, unknown or has another shape; a
                method that ships as something else than it trains cannot go on from that.
        """
        self._check_free(name)
        found = read(self.base_model, directory)
        method, tree = found.method, found.model
        if method is None:
            raise UserError(f"{directory}: does not say which method made it; give the run directory")
        if is_trainable:
            before = self.active
            self.add_adapter(name, method)
            try:
                continue_from(self.trees[name], tree, self.base_model, method)
            except UserError:
                self.delete_adapter(name)
                self.active = before
                raise
            return
        if not method.unfold(tree, self.base_model):
            self.loaded.add(name)
        self.trees[name], self.methods[name] = tree.train(self.training), method
        self.base_model.requires_grad_(False)
        self.set_adapter(name)


def _without_the_base(adapted: Adapted, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Leave in a state what trees have of their own: the base is saved elsewhere, and its tensors are in every tree."""
    shared = {tensor.data_ptr() for tensor in (*adapted.base_model.parameters(), *adapted.base_model.buffers())}
    for name in [name for name in state if name.startswith(prefix) and state[name].data_ptr() in shared]:
        del state[name]


def _ignore_the_base(adapted: Adapted, found: _IncompatibleKeys) -> None:
    """What `_without_the_base` leaves out is not missing."""
    kept = adapted.state_dict()
    found.missing_keys[:] = [name for name in found.missing_keys if any(name.endswith(own) for own in kept)]


def get_model(
    model: nn.Module, method: Transform | Mapping[str, object] | str, name: str = "default", seed: int = 0
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
    return adapted


def as_method(value: Transform | Mapping[str, object] | str) -> Transform:
    """A method from what a recipe may say.

    Raises:
        UserError: an unknown method or field.
    """
    from compressft.recipe.program import parse_transform

    try:
        return parse_transform(value, METHODS, "method")
    except ValueError as error:
        raise UserError(str(error)) from None
