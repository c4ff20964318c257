"""What the passes share that gate single weights of the transformer layers' linear projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.surgery import compress_linear
from compressft.modules.gate import Gate, MaskGate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.passes.shared.select import check_exclude, layer_linears
from compressft.transform import SHAPES, WEIGHTS, Claim, Context, Resource, Transform, ramp

# What passes take besides that learn which weights go.
LEARNED = Claim(Resource.SCORES, "learns which weights to leave out", fix="prune in an earlier stage")


class Unstructured(Transform):
    """A gate on every linear projection of the transformer layers; embeddings, pooler and head have none.

    Field `exclude`: parts that stay dense: "q", "k", "v", "o", "up", "down", or a module's full path; a fused qkv
    projection stays dense where any of its three does.
    """

    order: ClassVar[int] = WEIGHTS
    exclude: tuple[str, ...] = ()

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        """A new gate, everything alive, for the layer at this path."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, context: Context) -> None:
        check_exclude(model, f"pass {self.type}.exclude", self.exclude)
        paths = layer_linears(model, self.exclude)
        if not paths:
            raise UserError(f"pass {self.type}.exclude: {list(self.exclude)} leaves nothing to prune; exclude less")
        for path in paths:
            linear = compress_linear(model, path)
            linear.gates[self.type] = self.gate(path, linear).to(linear.weight.device)

    def gated(self, model: nn.Module) -> list[tuple[CompressedLinear, Gate]]:
        """(layer, gate) for every gate of this pass, in the model's order."""
        return gates_of(model, self.type, Gate)

    def finalize(self, model: nn.Module) -> None:
        for linear, _ in self.gated(model):
            linear.fold(self.type)

    def sparsity_now(self, model: nn.Module) -> float:
        """Fraction of the gated weights that is gone."""
        masks = [gate.mask for _, gate in self.gated(model)]
        return 1.0 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    def takes(self) -> Sequence[Claim]:
        # Of two, neither would keep its sparsity.
        return (Claim(Resource.SINGLE_WEIGHTS, "removes single weights", fix="give each a stage of its own"),)


class Gradual(Unstructured):
    """More and more goes between two points of training.

    Fields: nothing is pruned up to progress `start`; the full extent is reached at `end`, along `schedule`.
    """

    start: float = Field(default=0.05, ge=0, lt=1)
    end: float = Field(default=0.6, gt=0, le=1)
    schedule: Literal["cubic", "linear", "cosine", "constant"] = "cubic"

    def planned(self, progress: float) -> float:
        """Fraction in [0, 1] of the full extent that the schedule asks for."""
        return SHAPES[self.schedule](ramp(progress, self.start, self.end))

    def check(self) -> str | None:
        if self.end <= self.start:
            return f"pass {self.type}.end: {self.end} is not after {self.type}.start {self.start}"
        return None


class Masked(Gradual):
    """Masks computed again from the weights at `updates` + 1 evenly spaced points from `start` to `end`, then kept.

    Between two updates and after the last one the masks stay as they are: training recovers what pruning cost.
    """

    updates: int = Field(default=100, ge=1)

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        return MaskGate(linear.out_features, linear.in_features)

    def choose(self, weights: list[Tensor], extent: float) -> list[Tensor]:
        """Bool masks (True is kept) for these weights (out, in) at a fraction of the full extent."""
        raise NotImplementedError

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        fraction = ramp(progress, self.start, self.end)
        # A point that rounding puts just behind its step still counts as reached.
        due = int(fraction * self.updates + 1e-9) + (fraction > 0)
        gated = gates_of(model, self.type, MaskGate)
        # The counter is state: a resumed run has the masks of the last update, whose weights are gone.
        if due > int(gated[0][1].updates):
            masks = self.choose([present(linear) for linear, _ in gated], self.planned(progress))
            for (_, gate), mask in zip(gated, masks, strict=True):
                gate.keep(mask)
                gate.updates.fill_(due)


def present(linear: CompressedLinear) -> Tensor:
    """W + delta, (out, in), without a graph: what the gates act on."""
    weight = linear.weight if linear.delta is None else linear.weight + linear.delta()
    return weight.detach()
