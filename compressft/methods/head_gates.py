"""Head pruning as a method: gates or importance find the heads that a task does not need, and they are removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.methods.full import Full
from compressft.methods.layers import Layers
from compressft.model.anatomy import Layer, anatomy
from compressft.model.shrink import shrink
from compressft.model.surgery import compress_linear
from compressft.modules.gate import ColumnGate, GroupGate
from compressft.modules.head_gate import HeadGate
from compressft.modules.linear import CompressedLinear, gate_of
from compressft.modules.rank import keep_largest
from compressft.transform import Claim, Context, Resource, Transform, ramp

Kind = TypeVar("Kind", bound=GroupGate)


class HeadGates(Transform):
    """Prune attention heads while fine-tuning; grouped-query models lose a KV head with all its query heads.

    `decide` "gates" (Voita et al., ACL 2019): a hard-concrete gate per head under `penalty` * mean over layers of the
    expected number of open heads; how many go follows from `penalty`, the number of steps and `gate_lr`. Gates start
    open (log alpha 3). From progress `end` on they keep their values without noise: heads whose gate is 0 are gone, the
    others' factors are folded into the output projection. `decide` "importance" (Michel, Levy & Neubig, NeurIPS 2019):
    |dL/dgate| added up over the steps and normalised per layer by its L2 norm; the share of heads with the least of it
    rises from 0 at progress `start` to `heads` at `end`, and a head may return until then. Every layer keeps a head: a
    model without any cannot be written; where all gates are 0 that head's output is 0.

    Fields: `heads`, the share to remove, for "importance" alone. `weights`: "trained" along with the gates, or "frozen"
    but for the head of the model. `gate_lr` of log alpha, which has no weight decay; it follows the stage's scheduler.
    """

    type: Literal["head_gates"] = "head_gates"
    decide: Literal["gates", "importance"] = "gates"
    weights: Literal["trained", "frozen"] = "trained"
    penalty: float = Field(default=0.1, ge=0)
    gate_lr: float = Field(default=0.1, gt=0)
    heads: float | None = Field(default=None, gt=0, lt=1)
    start: float = Field(default=0.1, ge=0, lt=1)
    end: float = Field(default=0.7, gt=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> HeadGates:
        if self.decide == "importance" and self.heads is None:
            raise ValueError("heads: decide importance wants the share of heads to remove, such as 0.3")
        if self.decide == "gates" and self.heads is not None:
            raise ValueError("heads: learned gates get their number from penalty; remove it or decide by importance")
        if self.end <= self.start:
            raise ValueError(f"end: {self.end} is not after start {self.start}")
        return self

    def prepare(self, model: nn.Module, context: Context) -> None:
        layers = anatomy(model).layers
        if layers[0].family.fixed_heads:
            raise UserError(
                "method head_gates: all layers of this family share a position bias per head, so no head can go; "
                "take another method"
            )
        (Full() if self.weights == "trained" else Layers(top=0)).prepare(model, context)
        if self.end < 1.0 and not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                "method head_gates.weights: frozen leaves a language model nothing to train once the heads are "
                f"decided, from progress {self.end} on; set weights to trained, or end to 1.0"
            )
        generator = torch.Generator().manual_seed(context.seed)
        for layer in layers:
            linear = compress_linear(model, f"{layer.name}.{layer.family.o}")
            size = layer.head_dim * layer.heads // layer.kv_heads
            gate = (
                HeadGate(layer.kv_heads, size, generator)
                if self.decide == "gates"
                else ColumnGate(layer.kv_heads, size)
            )
            linear.gates[self.type] = gate.to(linear.weight.device)

    def _gates(self, model: nn.Module, kind: type[Kind]) -> list[Kind]:
        """One per layer."""
        found = (gate_of(layer.part(layer.family.o), self.type, kind) for layer in anatomy(model).layers)
        return [gate for gate in found if gate is not None]

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        if self.decide == "importance":
            return []
        learned = [gate.log_alpha for gate in self._gates(model, HeadGate)]
        return [{"params": learned, "lr": self.gate_lr, "weight_decay": 0.0}]

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        gates = self._gates(model, HeadGate)
        if self.decide == "importance" or not gates[0].sampling:
            return {}
        return {"head_gates.penalty": self.penalty * torch.stack([g.probability().sum() for g in gates]).mean()}

    def after_step(self, model: nn.Module, progress: float) -> None:
        learning = progress < self.end
        if self.decide == "gates":
            for gate in self._gates(model, HeadGate):
                gate.advance()
                gate.sampling = learning
                gate.log_alpha.requires_grad_(learning)
            return
        gates = self._gates(model, ColumnGate)
        for gate in gates:
            add_importance(gate)
            gate.measure(learning)
        if progress > self.start:
            for gate, kept in zip(gates, self._kept(gates, progress), strict=True):
                gate.keep(kept)

    def _kept(self, gates: Sequence[ColumnGate], progress: float) -> list[Tensor]:
        assert self.heads is not None
        share = self.heads * ramp(progress, self.start, self.end)
        number = round((1.0 - share) * sum(len(gate.mask) for gate in gates))
        return most_important([gate.importance for gate in gates], number)

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        keep = []
        for layer, gate in zip(anatomy(model).layers, self._gates(model, GroupGate), strict=True):
            if isinstance(gate, ColumnGate):
                gate.measure(False)
            if isinstance(gate, HeadGate):
                gate.sampling = False
            live = gate.mask != 0
            # Where none lives, one stays with its factor of 0.
            live[0] |= ~live.any()
            keep.append({"heads": torch.nonzero(live).flatten()})
            _settle(layer)
        shrink(model, keep)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        mask = torch.cat([gate.mask.detach() for gate in self._gates(model, GroupGate)])
        now = float((mask == 0).float().mean())
        if self.heads is None:
            # The penalty decides how many go.
            return {"heads": {"now": now, "planned": now, "target": now}}
        return {
            "heads": {"now": now, "planned": self.heads * ramp(progress, self.start, self.end), "target": self.heads}
        }

    def takes(self) -> Sequence[Claim]:
        return (Claim(Resource.HEADS, "removes attention heads"),)

    def changes(self) -> Sequence[Claim]:
        found = [Claim(Resource.COLUMNS, "removes input columns")]
        if self.weights == "trained":
            found.append(Claim(Resource.VALUES, "trains the weights", "weights", "set weights to frozen"))
        return found


def add_importance(gate: ColumnGate) -> None:
    """Add |dL/dgate| of the newest step to a gate's importance, nothing where there is none."""
    before = gate.importance.clone()
    if gate.mask.grad is not None:
        gate.accumulate(0.0)
        gate.importance += before


def most_important(scores: Sequence[Tensor], number: int) -> list[Tensor]:
    """Ascending indices, per layer, of the `number` heads with the highest scores over all layers.

    Scores are normalised per layer to unit L2 norm; a layer's best one stays whatever the others have.
    """
    unit = [score / score.norm().clamp(min=1e-30) for score in scores]
    for score in unit:
        score[score.argmax()] = torch.inf
    return [torch.nonzero(mask).flatten() for mask in keep_largest(unit, max(number, len(unit)))]


def _settle(layer: Layer) -> None:
    """Fold all gates of the attention's projections: what is cut must be plain."""
    for path in (*layer.projections, layer.family.o):
        linear = layer.part(path)
        if isinstance(linear, CompressedLinear) and len(linear.gates):
            linear.fold()
