"""N:M sparsity: of every M adjacent input columns, N weights stay in each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from compressft.errors import UserError
from compressft.modules.gate import Gate
from compressft.modules.linear import CompressedLinear
from compressft.modules.rank import keep_largest, keep_pattern
from compressft.passes.shared.masked import Masked
from compressft.transform import Resource, Want

# What an N:M pattern wants.
GROUPS = Want(Resource.COLUMNS, "wants its groups of input columns whole", fix="remove parts in an earlier stage")


class NM(Masked):
    """In each row of a weight, every group of `m` adjacent input columns keeps its `n` largest |W| (2:4 by default).

    The pattern of sparse tensor cores (Mishra et al. 2021). Gradual: at each point of the schedule that fraction of a
    layer's groups is pruned, those first whose removed weights sum to the least; from `end` on it is every group, and
    each has exactly n non-zeros. `schedule: constant` prunes all groups at `start`. The weights are stored dense.
    """

    type: Literal["n_m"] = "n_m"
    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=2)

    @model_validator(mode="after")
    def _fewer(self) -> NM:
        if self.n >= self.m:
            raise ValueError(f"n: {self.n} of {self.m} removes nothing; n must be less than m")
        return self

    def gate(self, path: str, linear: CompressedLinear) -> Gate:
        check_divides(f"pass {self.type}.m", self.m, path, linear)
        return super().gate(path, linear)

    def choose(self, weights: list[Tensor], extent: float) -> list[Tensor]:
        return [self._choose(weight.abs(), extent) for weight in weights]

    def _choose(self, size: Tensor, extent: float) -> Tensor:
        mask = keep_pattern(size, self.n, self.m)
        lost = (size * ~mask).unflatten(1, (-1, self.m)).sum(-1)
        (dense,) = keep_largest([lost], lost.numel() - round(extent * lost.numel()))
        return mask | dense.repeat_interleave(self.m, 1)

    @property
    def target(self) -> float:
        return 1.0 - self.n / self.m

    def wants(self) -> Sequence[Want]:
        return (GROUPS,)


def check_divides(field: str, m: int, path: str, linear: CompressedLinear) -> None:
    """Refuse a layer whose input columns are no whole groups.

    Raises:
        UserError: m does not divide them.
    """
    if linear.in_features % m:
        raise UserError(
            f"{field}: groups of {m} do not divide the {linear.in_features} input columns of {path!r}; "
            f"choose another size or exclude that module"
        )
