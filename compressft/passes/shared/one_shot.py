"""What the passes share that prune once, before training, by looking at activations."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from compressft.model.anatomy import anatomy
from compressft.modules.gate import MaskGate
from compressft.modules.linear import CompressedLinear, gate_of
from compressft.passes.n_m import GROUPS, check_divides
from compressft.passes.shared.calibrate import second_moments
from compressft.passes.shared.unstructured import SINGLE, fold_gates, gate_all, sparsity_now
from compressft.transform import WEIGHTS, Claim, Context, Transform, Want
from compressft.utils.phases import steps


class OneShot(Transform):
    """Choose the masks in `prepare`, layer by layer: each layer's inputs come through the pruned layers below it.

    Fields: `sparsity`, the fraction to remove, or `pattern` such as "2:4": two weights stay of every four adjacent
    input columns. `rows`: how many training rows are looked at. Training afterwards leaves the masks as they are.
    `exclude` is that of `Excludes`.
    """

    order: ClassVar[int] = WEIGHTS
    exclude: tuple[str, ...] = ()
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: str | None = None
    rows: int = Field(default=128, ge=1)

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        found = re.fullmatch(r"(\d+):(\d+)", value) if value is not None else None
        if value is not None and not (found and 0 < int(found[1]) < int(found[2])):
            raise ValueError(f"wants N:M with 0 < N < M, such as 2:4; got {value!r}")
        return value

    @model_validator(mode="after")
    def _one_target(self) -> OneShot:
        if (self.sparsity is None) == (self.pattern is None):
            raise ValueError("give either sparsity (such as 0.5) or pattern (such as 2:4)")
        return self

    @property
    def groups(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    def _gate(self, path: str, linear: CompressedLinear) -> MaskGate:
        if self.groups:
            check_divides(f"pass {self.type}.pattern", self.groups[1], path, linear)
        return MaskGate(linear.out_features, linear.in_features)

    def prepare(self, model: nn.Module, context: Context) -> None:
        batches = context.calibration(self.rows, f"pass {self.type}")
        gate_all(model, self, self._gate)
        for layer in steps(anatomy(model).layers, f"pass {self.type}"):
            linears = {f"{layer.name}.{path}": layer.part(path) for path in layer.linears}
            chosen = {name: (one, gate) for name, one in linears.items() if (gate := gate_of(one, self.type, MaskGate))}
            if not chosen:
                continue
            moments = second_moments(model, list(chosen), batches)
            with torch.no_grad():
                for path, (linear, gate) in chosen.items():
                    assert isinstance(linear, CompressedLinear)
                    gate.keep(self.prune(linear, moments[path]))

    @abstractmethod
    def prune(self, linear: CompressedLinear, moment: Tensor) -> Tensor:
        """A layer's mask (out, in), True is kept, from its inputs' E[x x^T] (in, in) fp32; may write the weight."""

    def finalize(self, model: nn.Module) -> None:
        fold_gates(model, self.type)

    @property
    def target(self) -> float:
        """Fraction to remove."""
        if self.groups:
            return 1.0 - self.groups[0] / self.groups[1]
        assert self.sparsity is not None
        return self.sparsity

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        return {"sparsity": {"now": sparsity_now(model, self.type), "planned": self.target, "target": self.target}}

    def takes(self) -> Sequence[Claim]:
        return (SINGLE,)

    def wants(self) -> Sequence[Want]:
        return (GROUPS,) if self.groups else ()
