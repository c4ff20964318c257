"""Depth: a shallower student made of some of the model's own layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.shrink import drop_layers
from compressft.transform import REMOVES, Claim, Context, Resource, Transform


class Depth(Transform):
    """Keep some layers and drop the others before training (student initialisation of DistilBERT, Sanh et al. 2019).

    Fields: `keep` is a number, k of L layers evenly from the first to the last: round(i * (L - 1) / (k - 1)), halves to
    even, which is [0, 2, 4, 7, 9, 11] for 6 of 12 as in DistilBERT; one layer is the first. Or a list of indices,
    counted from 0, ascending.

    Distillation's default layer map stays "uniform": student layer i of k stands for the i-th k-th of the teacher's
    depth, wherever its first values came from; "origin" follows the layers that were copied.
    """

    type: Literal["depth"] = "depth"
    order: ClassVar[int] = REMOVES
    gives: ClassVar[Sequence[Resource]] = (Resource.STARTING_LAYERS,)
    keep: int | tuple[NonNegativeInt, ...] = Field()

    def kept(self, depth: int, context: Context | None = None) -> list[int]:
        """Indices of the layers that stay, of `depth`.

        Raises:
            UserError: there are not so many layers.
        """
        if not isinstance(self.keep, int):
            return list(self.keep)
        if not 1 <= self.keep <= depth:
            raise UserError(f"pass depth.keep: {self.keep} layers asked for; the model has {depth}")
        return [round(i * (depth - 1) / max(self.keep - 1, 1)) for i in range(self.keep)]

    def prepare(self, model: nn.Module, context: Context) -> None:
        if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
            raise UserError("pass depth: the model scales attention by its layers' numbers, which would change")
        try:
            drop_layers(model, self.kept(len(anatomy(model).layers)))
        except UserError as error:
            raise UserError(f"pass depth.keep: {error}") from None

    def changes(self) -> Sequence[Claim]:
        return (Claim(Resource.STARTING_LAYERS, "removes layers before training"),)

    def check(self) -> str | None:
        if self.keep in (0, ()):
            return "pass depth.keep: no layer; keep at least one"
        return None
