"""What a compressed model may cost: milliseconds, parameters or bytes, absolute or relative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.costs import CostTable, Precision, Shape, counted
from compressft.utils.strict import Strict

if TYPE_CHECKING:
    from compressft.transform import Context

KINDS = ("latency_ms", "speedup", "parameters", "bytes", "sparsity")


class Target(Strict):
    """How small or fast the model has to become: exactly one of the five quantities.

    Fields: `latency_ms`: median milliseconds of the exported model at `batch` x `length` on this machine.
    `speedup`: the same as a factor over the fp32 ONNX of the recipe's model, as reports state it. `parameters`: number
    of parameters, or (up to 1) the fraction of the recipe's model's. `bytes`: of the exported model's tensors.
    `sparsity`: fraction of the heads' and FFN neurons' weights to remove, in [0, 1). `precision`: arithmetic of the
    model that ships, for `latency_ms`, `speedup` and `bytes`; None: what the recipe ends with.
    """

    latency_ms: float | None = Field(default=None, gt=0)
    speedup: float | None = Field(default=None, ge=1)
    parameters: float | None = Field(default=None, gt=0)
    bytes: int | None = Field(default=None, gt=0)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    batch: int = Field(default=1, ge=1)
    length: int = Field(default=128, ge=1)
    precision: Precision | None = None

    @model_validator(mode="after")
    def _one(self) -> Target:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; got {given or 'none'}")
        return self

    @property
    def kind(self) -> str:
        """The quantity that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def timed(self) -> bool:
        """Whether costs have to be measured."""
        return self.kind in ("latency_ms", "speedup")

    def budget(self, table: CostTable, base: Sequence[Shape]) -> float:
        """What the model may cost, in the table's unit.

        Args:
            base: shapes of the uncompressed model, for the relative targets.
        """
        value = float(getattr(self, self.kind))
        if self.kind == "speedup":
            return (table.cost(base) if table.reference is None else table.reference) / value
        if self.kind == "sparsity":
            return table.cost(base) * (1.0 - value)
        if self.kind == "parameters" and value <= 1:
            return table.cost(base) * value
        return value


def cost_table(model: nn.Module, target: Target, context: Context, who: str) -> tuple[CostTable, float]:
    """The table that a target counts in, and the budget in its unit.

    Raises:
        UserError: costs would have to be measured and nothing here can; or the model ships in an arithmetic without a
            table. `who` names the setting's owner.
    """
    precision = target.precision or context.ships
    if precision not in ("int8", "fp32") and target.kind in ("latency_ms", "speedup", "bytes"):
        raise UserError(
            f"{who}.target.{target.kind}: the recipe's model ships in {precision}, whose costs are not tabulated; "
            "set target.precision to int8 or fp32 to count in that"
        )
    if not target.timed:
        # What is neither costs as fp32 does.
        table = counted(model, target.kind, "int8" if precision == "int8" else "fp32")
    elif context.latency is None:
        raise UserError(f"{who}.target.{target.kind}: has to be measured; run it in a recipe's stage")
    else:
        table = context.latency(target, precision)
    base = context.base or [{"kv_heads": layer.kv_heads, "ffn": layer.ffn} for layer in anatomy(model).layers]
    return table, target.budget(table, base)
