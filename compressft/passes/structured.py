"""Structured pruning: heads, FFN neurons, layers and hidden dimensions, chosen while training, removed at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.shrink import drop_layers, narrow, shrink
from compressft.model.surgery import compress_linear
from compressft.modules.concrete_gate import ConcreteGate
from compressft.modules.gate import ColumnGate, GroupGate
from compressft.modules.lagrange import Lagrange
from compressft.modules.linear import CompressedLinear
from compressft.modules.part_gate import LayerGate
from compressft.passes.shared.choice import Floors, choose_by_importance
from compressft.passes.shared.gradual import End, Schedule, Start, check_span
from compressft.passes.shared.hidden import check_narrow, gate_stream, gate_tables, ungate_stream
from compressft.passes.shared.parts import STATE, Budget, Parts
from compressft.passes.shared.select_parts import aligned, keep_equally, keep_globally, keep_hidden, keep_layers, top
from compressft.passes.shared.sparsity import expected_sparsity, settle
from compressft.passes.shared.target import Target, cost_table
from compressft.transform import PARTS, SHAPES, Claim, Context, Resource, Transform, ramp

Kind = Literal["heads", "ffn", "layers", "hidden"]
KINDS: tuple[Kind, ...] = ("heads", "ffn", "layers", "hidden")
REMOVED: dict[Kind, tuple[Resource, str]] = {
    "heads": (Resource.HEADS, "removes attention heads"),
    "ffn": (Resource.NEURONS, "removes FFN neurons"),
    "layers": (Resource.LAYERS, "removes layers"),
    "hidden": (Resource.HIDDEN, "removes hidden dimensions"),
}

# The linear multiplier's share of `gate_lr`. The penalty pulls towards t - linear / (2 * quadratic); were both learned
# at one rate (Adam's steps are as long whatever the gradient) it would settle far beyond the target.
LINEAR_LR = 0.1


class Structured(Transform):
    """Remove the parts with the smallest first-order importance, or those that learned gates close.

    Importance is an exponential average of |dL/dmask| (Michel et al. 2019, equation 2), collected while training runs
    under the present masks; dropped parts keep a gradient and may return until the schedule ends. Sparsity follows
    `schedule` from 0 at progress `start` to its target at `end`, then stays (cool-down). FFN neurons stay in multiples
    of `align`; grouped-query models drop a KV head with all its query heads. Heads and neurons are those of the layers
    that stay.

    Fields: `heads`, `ffn`, `layers`, `hidden`: fraction to remove, in [0, 1); `hidden` are dimensions of the residual
    stream, of which a multiple of `align_hidden` stays. `floor_heads`, `floor_ffn`: the least a layer keeps.
    `uniform`: the same number in every layer, so that the saved model also loads with plain `from_pretrained` (as far
    as its configuration can say the shape).

    `target` instead of `heads` and `ffn`: what the model may cost in the end, `{latency_ms: 3.0}`, `{speedup: 4}`,
    `{parameters: 0.3}`, `{bytes: 8000000}` or `{sparsity: 0.8}` (`Target`); costs in milliseconds are measured once on
    this machine. The shapes that keep most importance within what `schedule` allows are chosen again at every step,
    with heads and neurons of all layers competing for one budget.

    `decide` "learned" trains hard-concrete gates for the kinds in `gates` instead (CoFi, Xia, Zhong & Chen 2022) under
    one constraint: `sparsity`, the fraction of the layers' matrices to remove. Its target is reached halfway between
    `start` and `end` and the gates are fixed at `end`. `gate_lr` is the learning rate of gates and multipliers.
    """

    type: Literal["structured"] = "structured"
    order: ClassVar[int] = PARTS
    heads: float = Field(default=0.0, ge=0, lt=1)
    ffn: float = Field(default=0.0, ge=0, lt=1)
    layers: float = Field(default=0.0, ge=0, lt=1)
    hidden: float = Field(default=0.0, ge=0, lt=1)
    start: Start = 0.05
    end: End = 0.6
    schedule: Schedule = "cubic"
    align: int = Field(default=32, ge=1)
    align_hidden: int = Field(default=32, ge=1)
    floor_heads: int = Field(default=1, ge=1)
    floor_ffn: int = Field(default=32, ge=1)
    momentum: float = Field(default=0.98, ge=0, lt=1)
    uniform: bool = False
    target: Target | None = None
    decide: Literal["importance", "learned"] = "importance"
    sparsity: float = Field(default=0.0, ge=0, lt=1)
    gates: tuple[Kind, ...] = ("heads", "ffn", "hidden")
    gate_lr: float = Field(default=0.1, gt=0)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What gets gates."""
        if self.decide == "learned":
            return tuple(kind for kind in KINDS if kind in self.gates)
        chosen = ("heads", "ffn") if self.target is not None else ()
        return tuple(kind for kind in KINDS if getattr(self, kind) > 0 or kind in chosen)

    def prepare(self, model: nn.Module, context: Context) -> None:
        generator = torch.Generator().manual_seed(context.seed)
        parts = anatomy(model)
        device = next(model.parameters()).device

        def gate(groups: int, size: int = 1) -> GroupGate:
            new = ConcreteGate(groups, size, generator) if self.decide == "learned" else ColumnGate(groups, size)
            return new.to(device)

        if "hidden" in self.kinds:
            self._check_width(model, parts.width)
        for layer in parts.layers:
            if "heads" in self.kinds:
                size = layer.head_dim * layer.heads // layer.kv_heads
                linear = compress_linear(model, f"{layer.name}.{layer.family.o}")
                linear.gates[self.type] = gate(layer.kv_heads, size)
            if "ffn" in self.kinds:
                linear = compress_linear(model, f"{layer.name}.{layer.family.down}")
                linear.gates[self.type] = gate(layer.ffn)
            if "layers" in self.kinds:
                LayerGate(gate(1)).attach(layer.module)
        state = nn.ModuleDict()
        if "hidden" in self.kinds:
            state["hidden"] = gate(parts.width)
            gate_stream(model, state["hidden"], self.type)  # type: ignore[arg-type]
        if self.decide == "learned":
            state["constraint"] = Lagrange().to(device)
        if self.target is not None:
            state["budget"] = Budget(*cost_table(model, self.target, context, "pass structured"))
        if len(state):
            parts.backbone.add_module(STATE, state)
        if self.target is not None:
            # A target beyond the floors is refused now, not when the schedule gets there.
            self._shapes(Parts.of(model, self.type), 1.0)

    def _check_width(self, model: nn.Module, width: int) -> None:
        if self.decide == "importance":
            kept = aligned((1.0 - self.hidden) * width, self.align_hidden, self.align_hidden, width)
            if kept == width:
                raise UserError(
                    f"pass structured.hidden: {self.hidden:g} of {width} dimensions is less than half of "
                    f"structured.align_hidden {self.align_hidden}; lower align_hidden or set hidden to 0"
                )
        check_narrow(
            model, "pass structured.hidden" if self.decide == "importance" else "pass structured.gates: hidden"
        )

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        if self.decide == "importance":
            return []
        parts = Parts.of(model, self.type)
        learned = [gate.log_alpha for gate in parts.concrete()]
        constraint = parts.constraint
        return [
            {"params": [*learned, constraint.quadratic], "lr": self.gate_lr, "weight_decay": 0.0},
            {"params": [constraint.linear], "lr": LINEAR_LR * self.gate_lr, "weight_decay": 0.0},
        ]

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        if self.decide == "importance":
            return {}
        parts = Parts.of(model, self.type)
        if not parts.sampling:
            return {}
        return {"structured.constraint": parts.constraint(expected_sparsity(parts))}

    def planned(self, target: float, progress: float) -> float:
        """Sparsity the schedule asks for."""
        end = self.end if self.decide == "importance" else (self.start + self.end) / 2
        return target * SHAPES[self.schedule](ramp(progress, self.start, end))

    def after_step(self, model: nn.Module, progress: float) -> None:
        parts = Parts.of(model, self.type)
        if parts.hidden is not None:
            gate_tables(model, parts.hidden)
        if self.decide == "learned":
            self._follow_gates(parts, progress)
        else:
            self._follow_importance(parts, progress)

    def _follow_importance(self, parts: Parts, progress: float) -> None:
        for gate in parts.chosen():
            gate.accumulate(self.momentum)
            gate.measure(progress < self.end)
        if progress <= self.start:
            return
        if parts.layers:
            importance = torch.cat([gate.importance for gate in parts.layers])
            kept = keep_layers(importance, 1.0 - self.planned(self.layers, progress)).tolist()
            for index, gate in enumerate(parts.layers):
                gate.mask.data.fill_(float(index in kept))
        if parts.hidden is not None:
            kept_width = 1.0 - self.planned(self.hidden, progress)
            parts.hidden.keep(keep_hidden(parts.hidden.importance, kept_width, self.align_hidden))
        if self.target is not None:
            self._follow_target(parts, progress)
            return
        select = keep_equally if self.uniform else keep_globally
        for gates, target, align, floor in (
            (parts.heads, self.heads, 1, self.floor_heads),
            (parts.ffn, self.ffn, self.align, self.floor_ffn),
        ):
            # Parts of dropped layers stay as they are until their layer returns.
            live = [gates[i] for i in parts.live_layers] if gates else []
            if live:
                chosen = select([g.importance for g in live], 1.0 - self.planned(target, progress), align, floor)
                for gate, groups in zip(live, chosen, strict=True):
                    gate.keep(groups)

    def _follow_target(self, parts: Parts, progress: float) -> None:
        for index, shape in zip(parts.live_layers, self._shapes(parts, progress), strict=True):
            heads, ffn = parts.heads[index], parts.ffn[index]
            heads.keep(top(heads.importance, shape["kv_heads"]))
            ffn.keep(top(ffn.importance, shape["ffn"]))

    def _shapes(self, parts: Parts, progress: float) -> list[dict[str, int]]:
        """What the live layers may keep: the most importance that fits between the full cost and the target.

        Squares compete: the gradient of a head's mask is a sum over its dimensions with signs at random, so that its
        square, and not its size, is to a neuron's what one loss is to the other (Molchanov et al. 2019, equation 8).
        """
        budget, full = parts.budget, parts.full_cost()
        return choose_by_importance(
            budget.table,
            full - self.planned(max(full - budget.limit, 0.0), progress),
            [parts.heads[i].importance.square() for i in parts.live_layers],
            [parts.ffn[i].importance.square() for i in parts.live_layers],
            Floors(self.align, self.floor_heads, self.floor_ffn),
        )

    def _follow_gates(self, parts: Parts, progress: float) -> None:
        constraint = parts.constraint
        done = progress >= self.end
        for gate in parts.concrete():
            gate.advance()
            gate.sampling = self.start < progress and not done
        constraint.target.fill_(self.planned(self.sparsity, progress))
        if progress > self.start and not int(constraint.settled):
            settle(parts, self, self.sparsity if done else None)
            constraint.settled.fill_(int(done))

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        parts = Parts.of(model, self.type)
        for gate in parts.chosen():
            gate.measure(False)
        for gate in parts.concrete():
            gate.sampling = False
        dims = None
        if parts.hidden is not None:
            dims = torch.nonzero(parts.hidden.mask).flatten()
            ungate_stream(model, parts.hidden, self.type)
        if hasattr(parts.backbone, STATE):
            delattr(parts.backbone, STATE)
        if parts.layers:
            for layer in anatomy(model).layers:
                LayerGate.detach(layer.module)
            drop_layers(model, parts.live_layers)
        keep: list[dict[str, Tensor]] = []
        for layer in anatomy(model).layers:
            kept: dict[str, Tensor] = {}
            for name, path in (("heads", layer.family.o), ("ffn", layer.family.down)):
                if name in self.kinds:
                    linear = layer.part(path)
                    assert isinstance(linear, CompressedLinear)
                    kept[name] = torch.nonzero(linear.gates[self.type].mask).flatten()
                    linear.fold(self.type)
            keep.append(kept)
        shrink(model, keep)
        if dims is not None and len(dims) < anatomy(model).width:
            narrow(model, dims)

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        parts = Parts.of(model, self.type)
        if self.decide == "learned":
            now = {"sparsity": (float(parts.sparsity()), self.sparsity)}
        else:
            kinds = [kind for kind in self.kinds if getattr(self, kind) > 0]
            now = {kind: (parts.removed(kind), getattr(self, kind)) for kind in kinds}
            if self.target is not None:
                now["cost"] = parts.saved()
        return {
            name: {"now": value, "planned": self.planned(target, progress), "target": target}
            for name, (value, target) in now.items()
        }

    def takes(self) -> Sequence[Claim]:
        def claim(kind: Kind) -> Claim:
            if self.decide == "importance" and getattr(self, kind) == 0:
                return Claim(*REMOVED[kind], "target")
            return Claim(*REMOVED[kind], "gates" if self.decide == "learned" else kind, f"leave {kind} out")

        return [claim(kind) for kind in self.kinds]

    def check(self) -> str | None:
        fractions = [kind for kind in KINDS if getattr(self, kind) > 0]
        if (late := check_span(self)) is not None:
            return late
        if self.decide == "learned":
            if self.target is not None:
                return "pass structured.target: is for decide importance; learned gates take sparsity"
            if fractions:
                return f"pass structured.{fractions[0]}: learned gates divide one budget; set sparsity instead"
            if self.sparsity == 0:
                return "pass structured.sparsity: is 0; set the fraction that learned gates remove"
            if not self.gates:
                return "pass structured.gates: is empty; name what gets a gate: heads, ffn, layers, hidden"
            return None
        if self.target is not None and (self.heads > 0 or self.ffn > 0 or self.uniform):
            return "pass structured.target: finds heads and ffn of each layer itself; leave out heads, ffn and uniform"
        if self.sparsity > 0:
            return 'pass structured.sparsity: is for learned gates; set decide to "learned" or sparsity to 0'
        if not fractions and self.target is None:
            return "pass structured: heads and ffn are both 0, and so are layers and hidden; set one of them"
        return None


__all__ = ["Structured", "keep_equally", "keep_globally"]
