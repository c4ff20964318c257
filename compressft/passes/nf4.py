"""Frozen weights in 4-bit NormalFloat while training, as in QLoRA: an eighth of their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from compressft.errors import UserError
from compressft.model.surgery import compress_linear
from compressft.modules.linear import CompressedLinear
from compressft.modules.store import NF4Store
from compressft.passes.shared.select import check_exclude, layer_linears
from compressft.transform import OBJECTIVE, Claim, Context, Resource, Transform, Want


class Nf4(Transform):
    """The transformer layers' projections in NF4 (Dettmers et al. 2023) for as long as the stage trains.

    For methods that leave weights frozen: adapters, masks and deltas train on the dequantised values, and those are
    what the stage ships, in fp32 (another pass may quantise them). Projections that the method trains stay as they
    are. `double` stores the blocks' scales in 8 bits: 0.516 instead of 0.563 bytes a weight. `exclude` lists what stays
    fp32: "q", "k", "v", "o", "up", "down" or a module's full path; a fused qkv projection stays where any of its three
    does.
    """

    type: Literal["nf4"] = "nf4"
    # After the method, which says what is frozen; settled before any pass folds or removes something.
    order: ClassVar[int] = OBJECTIVE + 5
    double: bool = True
    exclude: tuple[str, ...] = ()

    def prepare(self, model: nn.Module, context: Context) -> None:
        check_exclude(model, "pass nf4.exclude", self.exclude)
        frozen = [p for p in layer_linears(model, self.exclude) if not _trained(model.get_submodule(p))]
        if not frozen:
            raise UserError(
                "pass nf4: every projection is trained or excluded, and four bits cannot take an update; "
                "take a method that freezes weights, such as adapter"
            )
        for path in frozen:
            layer = compress_linear(model, path)
            if layer.weight.numel() % 2:
                raise UserError(f"pass nf4: {path} has an odd number of weights; name it in nf4.exclude")
            if layer.store is None:
                layer.pack(NF4Store(layer.weight.detach(), self.double))

    def finalize(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, CompressedLinear):
                module.unpack()

    def changes(self) -> Sequence[Claim]:
        return (Claim(Resource.STORE, "stores the weights in four bits"),)

    def wants(self) -> Sequence[Want]:
        return (Want(Resource.VALUES, "stores frozen weights", fix="take a method that freezes them"),)


def _trained(layer: nn.Module) -> bool:
    weight = layer.weight
    return isinstance(weight, nn.Parameter) and weight.requires_grad
