"""Gates of whole layers and of the residual stream's dimensions; a forward hook puts each where it acts."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from compressft.modules.gate import Gate, GroupGate
from compressft.modules.linear import is_dense
from compressft.modules.tap import states_in

# What a layer gives: hidden states, alone or before others.
States: TypeAlias = Tensor | tuple[Tensor, ...]


class LayerGate(nn.Module):
    """out = g * layer(h) + (1 - g) * h with one number g: 1 leaves the layer alone, 0 makes it the identity.

    `gate` holds g as its only group. `attach` registers it inside the layer as `layer_gate`.
    """

    gate: GroupGate

    def __init__(self, gate: GroupGate) -> None:
        super().__init__()
        self.gate = gate

    def attach(self, layer: nn.Module) -> None:
        """Act on this layer; before other hooks, so that hidden states are recorded behind the gate."""
        layer.add_module("layer_gate", self)
        layer.register_forward_hook(self.on_output, prepend=True, with_kwargs=True)

    @staticmethod
    def detach(layer: nn.Module) -> None:
        """Take the gate out of a layer again."""
        del layer.layer_gate
        unhook(layer, LayerGate)

    def on_output(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: States
    ) -> States | None:
        """Forward hook of a layer whose first argument and (first) result are hidden states."""
        if is_dense():
            return None
        hidden = states_in(args, kwargs)
        g = self.gate.columns()[0]
        after = output[0] if isinstance(output, tuple) else output
        if not g.requires_grad:
            # A number now: nothing to compute at 0 and 1.
            value = float(g)
            mixed = after if value == 1.0 else hidden if value == 0.0 else value * after + (1.0 - value) * hidden
        else:
            mixed = g * after + (1.0 - g) * hidden
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


class StreamMask(Gate):
    """The residual stream's gate as others see it: readers, adapters, tables, and a projection into the stream.

    As a weight's gate it drops the columns of dead dimensions. Their inputs are 0 anyway; but what looks at whole rows
    (a quantizer's scales) must not see them. A fractional factor stays with the norms.
    """

    def __init__(self, gate: GroupGate) -> None:
        super().__init__()
        # In a tuple: it is registered elsewhere, once.
        self.gate = (gate,)

    def columns(self) -> Tensor:
        """1 for live dimensions, 0 for dead ones, without a graph."""
        gate = self.gate[0].columns().detach()
        return (gate != 0).to(gate.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.columns()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # x is 0 where a column is dead.
        return nn.functional.linear(x, weight, bias)

    def on_input(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Forward pre-hook of a module on what is written to the stream: it sees live dimensions only."""
        if is_dense():
            return None
        live = self.columns()
        cut = tuple(a * live.to(a.dtype) if isinstance(a, Tensor) else a for a in args)
        return cut, {k: v * live.to(v.dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def on_output(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor | None:
        """Forward hook of a projection that writes the stream with no norm behind it."""
        return None if is_dense() else output * self.gate[0].columns().to(output.dtype)


def unhook(module: nn.Module, owner: type[nn.Module]) -> None:
    """Remove the hooks that are methods of an `owner` from a module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), owner):
                del hooks[key]
    for flags, hooks in (
        (module._forward_hooks_with_kwargs, module._forward_hooks),
        (module._forward_pre_hooks_with_kwargs, module._forward_pre_hooks),
    ):
        for key in [key for key in flags if key not in hooks]:
            del flags[key]
