"""Tap: a child of a backbone that sees what every layer hands on and replaces the states above the top layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from compressft.errors import UserError
from compressft.modules.families import FAMILIES
from compressft.modules.kinds import Extra
from compressft.modules.linear import is_bare

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput


class Tap(Extra):
    """Base of modules that `attach` puts into a backbone as a child: no module of the backbone is renamed or wrapped.

    Hooks read what enters each layer, (B, T, d), which is what the layer below handed on whatever other hooks did to
    it. They sit on whole layers, so gradient checkpointing recomputes behind them, and a layer that is computed again
    outside the backbone's forward is not seen twice. `above_norm`: where a final norm stands above the top layer,
    whether its output is replaced or its input. Under `bare()` nothing is.
    """

    above_norm: ClassVar[bool]
    # Names of the backbone's arguments that `top` wants, and of its layers' (a backbone may make its own cache).
    wants: ClassVar[tuple[str, ...]] = ()
    wants_of_layer: ClassVar[tuple[str, ...]] = ()
    # Off while somebody else does what `top` does.
    enabled: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._states: list[Tensor] = []
        self._inputs: dict[str, object] = {}
        self._open = False

    def attach(self, owner: PreTrainedModel) -> None:
        """Act on the backbone whose child this is."""
        family = FAMILIES[owner.config.model_type]
        owner.register_forward_pre_hook(self._on_backbone, with_kwargs=True)
        for layer in owner.get_submodule(family.layers).children():
            layer.register_forward_pre_hook(self._on_layer, with_kwargs=True)
        if family.final_norm is None:
            owner.get_submodule(family.layers.rpartition(".")[0]).register_forward_hook(self._on_stack)
        elif self.above_norm:
            owner.get_submodule(family.final_norm).register_forward_hook(self._on_norm_output)
        else:
            owner.get_submodule(family.final_norm).register_forward_pre_hook(self._on_norm_input)

        owner.register_forward_hook(self._after_backbone)

    def top(self, states: list[Tensor], last: Tensor, inputs: Mapping[str, object]) -> Tensor:
        """What stands above the top layer from now on, (B, T, d).

        Args:
            states: what enters each layer, embeddings first; each (B, T, d).
            last: what would stand there.
            inputs: the arguments named in `wants` and `wants_of_layer`, None where one was not given.
        """
        raise NotImplementedError

    def _on_backbone(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._states = []
        self._open = self.enabled and not is_bare()
        if self._open:
            self._inputs = _named(self.wants, module, args, kwargs)

    def _on_layer(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._open:
            if not self._states:
                self._inputs |= _named(self.wants_of_layer, module, args, kwargs)
            self._states.append(states_in(args, kwargs))

    def _after_backbone(self, module: nn.Module, args: object, output: object) -> None:
        if self._open:
            self._open = False
            raise UserError(
                f"{self.kind}: what stood above the top layer was replaced, as pass structured.hidden does with a "
                "final norm; leave hidden out"
            )

    def _replaced(self, last: Tensor) -> Tensor | None:
        if not self._open:
            return None
        states, inputs = self._states, self._inputs
        # Nothing is kept beyond the forward.
        self._states, self._inputs, self._open = [], {}, False
        return self.top(states, last, inputs)

    def _on_stack(self, module: nn.Module, args: object, output: BaseModelOutput) -> None:
        assert output.last_hidden_state is not None
        new = self._replaced(output.last_hidden_state)
        if new is not None:
            output.last_hidden_state = new

    def _on_norm_output(self, module: nn.Module, args: object, output: Tensor) -> Tensor | None:
        return self._replaced(output)

    def _on_norm_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        new = self._replaced(args[0])
        return None if new is None else (new, *args[1:])


def states_in(args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
    """The hidden states, (B, T, d), among the arguments of a layer."""
    states = args[0] if args else kwargs["hidden_states"]
    assert isinstance(states, Tensor)
    return states


def _named(
    names: tuple[str, ...], module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> dict[str, object]:
    """What the module is given under these names, however it is passed; None where it is not."""
    if not names:
        return {}
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    return {name: given.get(name) for name in names}
