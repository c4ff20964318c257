"""Diff pruning: a frozen model and a sparse difference per task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressft.methods.layers import Layers
from compressft.methods.places import linear_paths
from compressft.model.surgery import compress_linear
from compressft.modules.diff import WeightDiff
from compressft.modules.linear import CompressedLinear
from compressft.modules.rank import keep_largest
from compressft.transform import Context, Transform


class Diff(Transform):
    """theta = theta0 + z * w with hard-concrete z, then an exact cut (Guo, Rush & Kim, ACL 2021).

    Up to progress `end`, w and the gates' log alpha are learned under `penalty` * sum P(z > 0) (with one more gate per
    matrix where `structured`). There, exactly round(density * N) entries with the largest |z * w| stay, z without
    noise, counted over all matrices together; from there on those entries alone are trained. The linear projections of
    the layers have a diff; biases, norms and embeddings stay frozen, and the head is trained whole. Training holds two
    more copies of the projections and their optimiser state.

    Fields: `learning_rate` of w (default: the stage's) and `gate_lr` of the log alphas, both without weight decay; they
    follow the stage's scheduler.
    """

    type: Literal["diff"] = "diff"
    density: float = Field(default=0.005, gt=0, lt=1)
    structured: bool = True
    penalty: float = Field(default=1.25e-7, ge=0)
    end: float = Field(default=0.6, gt=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    gate_lr: float = Field(default=0.1, gt=0)

    def prepare(self, model: nn.Module, context: Context) -> None:
        Layers(top=0).prepare(model, context)
        for path in linear_paths(model):
            linear = compress_linear(model, path)
            new = WeightDiff(linear.out_features, linear.in_features, self.structured)
            linear.delta = new.train(linear.training).to(linear.weight.device)

    def _diffs(self, model: nn.Module) -> list[WeightDiff]:
        return [m.delta for m in model.modules() if isinstance(m, CompressedLinear) and isinstance(m.delta, WeightDiff)]

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        diffs = self._diffs(model)
        values: dict[str, object] = {"params": [diff.values for diff in diffs], "weight_decay": 0.0}
        if self.learning_rate is not None:
            values["lr"] = self.learning_rate
        gates = [parameter for diff in diffs for parameter in diff.gate_parameters]
        return [values, {"params": gates, "lr": self.gate_lr, "weight_decay": 0.0}]

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], outputs: object, context: Context
    ) -> dict[str, Tensor]:
        diffs = self._diffs(model)
        if diffs[0].fixed or self.penalty == 0:
            return {}
        return {"diff.penalty": self.penalty * torch.stack([diff.penalty() for diff in diffs]).sum()}

    def after_step(self, model: nn.Module, progress: float) -> None:
        diffs = self._diffs(model)
        # The flag is state: after a resume, gates that have been cut are not cut again.
        if progress >= self.end and not int(diffs[0].cuts):
            self._cut(diffs)
        for diff in diffs:
            diff.follow()

    @torch.no_grad()
    def _cut(self, diffs: list[WeightDiff]) -> None:
        sizes = [diff.settled().abs() for diff in diffs]
        number = round(self.density * sum(size.numel() for size in sizes))
        for diff, mask in zip(diffs, keep_largest(sizes, number), strict=True):
            diff.cut(mask)

    @torch.no_grad()
    def finalize(self, model: nn.Module) -> None:
        diffs = self._diffs(model)
        if not diffs[0].fixed:
            self._cut(diffs)
        for module in model.modules():
            if isinstance(module, CompressedLinear) and isinstance(module.delta, WeightDiff):
                # Passes fold their gates themselves, later.
                module.unpack()
                module.weight.data = (module.weight + module.delta()).to(module.weight.dtype)
                module.delta = None

    @torch.no_grad()
    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        diffs = self._diffs(model)
        total = sum(diff.values.numel() for diff in diffs)
        now = self.density
        if not diffs[0].fixed:
            now = sum(int(torch.count_nonzero(diff.settled())) for diff in diffs) / total
        planned = self.density if progress >= self.end else now
        return {"density": {"now": now, "planned": planned, "target": self.density}}
