"""The gates that structured pruning has put into a model, found again from the model alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressft.model.anatomy import Layer, anatomy
from compressft.model.costs import CostTable
from compressft.modules.concrete_gate import ConcreteGate
from compressft.modules.gate import ColumnGate, GroupGate
from compressft.modules.lagrange import Lagrange
from compressft.modules.linear import gate_of
from compressft.modules.part_gate import LayerGate
from compressft.passes.shared.select_parts import Alive, encoder_sparsity

# Submodule of the backbone that holds what belongs to no layer.
STATE = "structured_state"


class Budget(nn.Module):
    """What a target counts in and allows; no tensors: a resumed run gets it from the same table."""

    def __init__(self, table: CostTable, limit: float) -> None:
        super().__init__()
        self.table = table
        self.limit = limit


@dataclass(frozen=True)
class Parts:
    """Gates per layer and kind; a list is empty (`hidden` None) where a kind has none."""

    backbone: nn.Module
    anatomy: tuple[Layer, ...]
    width: int
    heads: list[GroupGate]
    ffn: list[GroupGate]
    layers: list[GroupGate]
    hidden: GroupGate | None

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Parts:
        """Look for the gates of the pass `name`."""
        parts = anatomy(model)
        state = getattr(parts.backbone, STATE, {})
        gates: dict[str, list[GroupGate]] = {"heads": [], "ffn": [], "layers": []}
        for layer in parts.layers:
            for kind, path in (("heads", layer.family.o), ("ffn", layer.family.down)):
                gate = gate_of(layer.part(path), name, GroupGate)
                if gate is not None:
                    gates[kind].append(gate)
            gate = getattr(layer.module, "layer_gate", None)
            if isinstance(gate, LayerGate):
                gates["layers"].append(gate.gate)
        hidden = dict(state.items()).get("hidden")
        return cls(parts.backbone, parts.layers, parts.width, **gates, hidden=hidden)

    @property
    def constraint(self) -> Lagrange:
        """The Lagrangian of learned gates."""
        return getattr(self.backbone, STATE)["constraint"]

    @property
    def budget(self) -> Budget:
        """The cost table and limit of a target."""
        return getattr(self.backbone, STATE)["budget"]

    def full_cost(self) -> float:
        """What the live layers cost whole, and the rest of the model."""
        return self.budget.table.cost(
            [{"kv_heads": len(self.heads[i].mask), "ffn": len(self.ffn[i].mask)} for i in self.live_layers]
        )

    def saved(self) -> tuple[float, float]:
        """Fraction of the live layers' full cost that is saved now, and that the target wants saved."""
        kept = [
            {"kv_heads": int((self.heads[i].mask != 0).sum()), "ffn": int((self.ffn[i].mask != 0).sum())}
            for i in self.live_layers
        ]
        full = self.full_cost()
        return 1.0 - self.budget.table.cost(kept) / full, max(1.0 - self.budget.limit / full, 0.0)

    @property
    def live_layers(self) -> list[int]:
        """Indices of the layers that are not dropped now."""
        if not self.layers:
            return list(range(len(self.anatomy)))
        return [i for i, gate in enumerate(self.layers) if bool(gate.mask[0] != 0)]

    @property
    def sampling(self) -> bool:
        """Whether learned gates are being learned now."""
        return any(gate.sampling for gate in self.concrete())

    def gates(self) -> Iterator[GroupGate]:
        """All of them."""
        yield from (*self.heads, *self.ffn, *self.layers)
        if self.hidden is not None:
            yield self.hidden

    def chosen(self) -> Iterator[ColumnGate]:
        """All of them, where importance decides."""
        return (gate for gate in self.gates() if isinstance(gate, ColumnGate))

    def concrete(self) -> Iterator[ConcreteGate]:
        """All of them, where they are learned."""
        return (gate for gate in self.gates() if isinstance(gate, ConcreteGate))

    def removed(self, kind: str) -> float:
        """Fraction of a kind that is dropped now; heads and neurons count in live layers."""
        if kind == "hidden":
            assert self.hidden is not None
            gates = [self.hidden]
        elif kind == "layers":
            gates = self.layers
        else:
            of_kind = self.heads if kind == "heads" else self.ffn
            gates = [of_kind[i] for i in self.live_layers]
        return float(1.0 - (torch.cat([gate.mask.detach() for gate in gates]) != 0).float().mean())

    def costs(self) -> tuple[list[int], list[int]]:
        """Weights per hidden dimension of one KV group (its rows of q, k, v and columns of o) and of one neuron."""
        heads = [x.head_dim * (2 * x.heads // x.kv_heads + 2) for x in self.anatomy]
        return heads, [len(x.family.up) + 1 for x in self.anatomy]

    def sparsity(self) -> Tensor:
        """Fraction of the layers' matrices that is dropped now."""
        return self.measured([(gate.mask.detach() != 0).float() for gate in self.gates()])

    def measured(self, values: list[Tensor]) -> Tensor:
        """`encoder_sparsity` of one value per group of every gate, in the order of `gates`; what has no gate lives."""
        rest = iter(values)
        device = values[0].device
        heads = [next(rest) if self.heads else torch.ones(x.kv_heads, device=device) for x in self.anatomy]
        ffn = [next(rest) if self.ffn else torch.ones(x.ffn, device=device) for x in self.anatomy]
        layers = [next(rest) if self.layers else torch.ones(1, device=device) for _ in self.anatomy]
        hidden = torch.ones(self.width, device=device) if self.hidden is None else next(rest)
        return encoder_sparsity(Alive(heads, ffn, torch.cat(layers), hidden), *self.costs())
