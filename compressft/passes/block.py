"""Block movement pruning: tiles of the attention's weights and FFN neurons go by learned scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.model.anatomy import Layer, anatomy
from compressft.model.shrink import shrink
from compressft.modules.gate import ScoreGate
from compressft.modules.linear import CompressedLinear, gate_of, gates_of
from compressft.passes.shared.scored import Scored
from compressft.passes.shared.unstructured import add_gate, chosen, nothing_left, removed
from compressft.transform import PARTS, Claim, Context, Resource, Want


class Block(Scored):
    """Movement pruning with one score per tile (Lagunas et al. 2021): dL/dS = sum over the tile of dL/dW' * W.

    Attention projections are cut into tiles of `tile` x `tile` weights (those at an edge may be smaller). The FFN loses
    whole neurons (`ffn` "neurons": one score per input column of the down projection) or tiles ("tiles"). `sparsity` is
    the fraction of the tiles, and of the neurons, that goes; `scope` "global" spends it where the scores are, "layer"
    in each weight alike. The other fields are those of `movement`.

    In the end FFN neurons without a weight in the down projection, and heads without one in the output projection or
    without values, are really removed (grouped-query heads with their whole group; at least one of each stays), so that
    the model is smaller and faster everywhere. Tiles that die elsewhere stay as zeros, which dense runtimes multiply
    like any number.
    """

    type: Literal["block"] = "block"
    order: ClassVar[int] = PARTS
    tile: int = Field(default=32, ge=1)
    ffn: Literal["neurons", "tiles"] = "neurons"
    scope: Literal["global", "layer"] = "global"

    def prepare(self, model: nn.Module, context: Context) -> None:
        paths = set(chosen(model, self))
        gated = False
        for layer in anatomy(model).layers:
            # A neuron's rows in the up projections go with its column in the down projection.
            skipped = layer.family.up if self.ffn == "neurons" else ()
            for part in layer.linears:
                path = f"{layer.name}.{part}"
                if path in paths and part not in skipped:
                    add_gate(model, self.type, path, partial(self._gate, layer, part))
                    gated = True
        if not gated:
            raise nothing_left(self)

    def _gate(self, layer: Layer, part: str, path: str, linear: CompressedLinear) -> ScoreGate:
        shape, tile = (linear.out_features, linear.in_features), (self.tile, self.tile)
        if part == layer.family.down:
            return ScoreGate(*shape, (shape[0], 1) if self.ffn == "neurons" else tile, unit=1)
        if part == layer.family.o:
            return ScoreGate(*shape, tile, unit=layer.head_dim * layer.heads // layer.kv_heads)
        return ScoreGate(*shape, tile)

    def _kinds(self, model: nn.Module) -> dict[str, list[ScoreGate]]:
        """The attention's and the FFN's gates, in order."""
        kinds: dict[str, list[ScoreGate]] = {"attention": [], "ffn": []}
        for layer in anatomy(model).layers:
            for part in layer.linears:
                linear = layer.part(part)
                gate = gate_of(linear, self.type, ScoreGate)
                if gate is not None:
                    ffn = part in (*layer.family.up, layer.family.down)
                    kinds["ffn" if ffn else "attention"].append(gate)
        return {name: gates for name, gates in kinds.items() if gates}

    def pools(self, model: nn.Module) -> list[list[ScoreGate]]:
        if self.scope == "global":
            return list(self._kinds(model).values())
        return [[gate] for _, gate in gates_of(model, self.type, ScoreGate)]

    def shares(self, model: nn.Module) -> dict[str, float]:
        return {name: removed(gates) for name, gates in self._kinds(model).items()}

    def finalize(self, model: nn.Module) -> None:
        super().finalize(model)
        keep: list[dict[str, Tensor]] = []
        for layer in anatomy(model).layers:
            live = {"heads": live_groups(layer), "ffn": live_neurons(layer)}
            keep.append({name: torch.nonzero(mask).flatten() for name, mask in live.items() if not mask.all()})
        shrink(model, keep)

    def takes(self) -> Sequence[Claim]:
        heads = Claim(Resource.HEADS, "removes attention heads")
        return (*super().takes(), heads, Claim(Resource.NEURONS, "removes FFN neurons"))

    def wants(self) -> Sequence[Want]:
        return (Want(Resource.COLUMNS, "counts tiles of input columns"),)


def live_groups(layer: Layer) -> Tensor:
    """KV groups that can reach the layer's output, bool (groups,); the first where none can."""
    columns = _weight(layer.part(layer.family.o)).ne(0).any(0)
    live = columns.unflatten(0, (layer.kv_heads, -1)).any(1)
    path = layer.family.v or layer.family.fused_qkv
    assert path is not None
    values = layer.part(path)
    # What an adapter adds to the values is not in their weight.
    if getattr(values, "adapter", None) is None:
        rows = _weight(values).ne(0).any(1)
        if isinstance(values.bias, Tensor):
            rows = rows | values.bias.ne(0)
        # A fused projection's values are its last third.
        live = live & rows[-layer.kv_heads * layer.head_dim :].unflatten(0, (layer.kv_heads, -1)).any(1)
    return _at_least_one(live)


def live_neurons(layer: Layer) -> Tensor:
    """FFN neurons that can reach the layer's output, bool (ffn,); the first where none can."""
    return _at_least_one(_weight(layer.part(layer.family.down)).ne(0).any(0))


def _at_least_one(live: Tensor) -> Tensor:
    # The same one that the gate's `columns` leaves alive for dynamic ranges.
    live[0] |= ~live.any()
    return live


def _weight(module: nn.Module) -> Tensor:
    """(out, in), without a graph."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if type(module).__name__ == "Conv1D" else weight.detach()
