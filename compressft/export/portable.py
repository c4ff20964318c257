"""Prove from the file alone that every processor computes the same: no sum of u8 x s8 products passes 16 bits.

And no layer leaves its arithmetic to the runtime: what onnxruntime makes of accuracy_level 4 differs by processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compressft.modules.int8 import quantise_weight
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer, Int8Quantizer

if TYPE_CHECKING:
    from onnx import NodeProto

# vpmaddubsw adds the products of inputs 2k and 2k + 1 into a signed 16-bit integer, saturating.
LIMIT = 2**15 - 1
ACTIVATION = 255
# Which input is the weight (in, out) of onnxruntime's and ONNX' integer products.
PRODUCTS = {
    "QAttention": 1,
    "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
    "QGemm": 3,
}
# What onnxruntime turns into one of them where both inputs are dequantised.
FLOATING = ("MatMul", "Gemm")
WRONG_ON = (
    "x86-64 processors with AVX2 or AVX-512 and without VNNI (such as Intel's from Haswell to Comet Lake and AMD's "
    "from Zen to Zen 3)"
)
# MatMulNBits' accuracy_level that lets the runtime round the inputs.
ROUNDED = 4


@dataclass(frozen=True)
class PairSum:
    """The largest magnitude that the sum of a pair of products can reach in one product; None: not known."""

    layer: str
    largest: int | None

    @property
    def fits(self) -> bool:
        """Whether 16 bits hold it."""
        return self.largest is not None and self.largest <= LIMIT


@dataclass(frozen=True)
class Portability:
    """What is known of all of a file's integer products.

    `rounded` are the 4-bit layers whose inputs the runtime rounds by the rule of each processor's kernel.
    """

    sums: tuple[PairSum, ...]
    rounded: tuple[str, ...] = ()

    @property
    def saturates(self) -> bool:
        """Whether a sum may be lost, on the processors of `WRONG_ON`."""
        return not all(one.fits for one in self.sums)

    @property
    def portable(self) -> bool:
        """Whether the file computes the same on every processor."""
        return not self.saturates and not self.rounded

    @property
    def beyond(self) -> list[PairSum]:
        """Those that can saturate, the worst first."""
        return sorted((one for one in self.sums if not one.fits), key=lambda one: -(one.largest or 2**31))

    def rows(self) -> dict[str, object]:
        """As it stands in report.json: `portable`, and the `pair_sums` that say why."""
        known = [one.largest for one in self.sums if one.largest is not None]
        beyond = {one.layer: one.largest for one in self.beyond}
        sums = {"products": len(self.sums), "largest": max(known, default=None), "limit": LIMIT, "beyond": beyond}
        return {"portable": self.portable, "pair_sums": sums}

    def warning(self) -> str | None:
        """Where the file gives other answers and how to mend it; None where it is right everywhere."""
        said = []
        if self.saturates:
            worst = self.beyond[0]
            reach = "an unknown value" if worst.largest is None else f"{worst.largest:,}"
            said.append(
                f"{WRONG_ON} give other answers, because {len(self.beyond)} of {len(self.sums)} integer products can "
                f"pass {LIMIT:,} in the 16 bits that they add in ({worst.layer}: {reach}); train with pass int8.target "
                "any (the default) for a file that is right on every processor"
            )
        if self.rounded:
            number = len(self.rounded)
            said.append(
                f"the inputs of {number} 4-bit layer{'s' if number > 1 else ''} are rounded as in training on x86-64 "
                "with AVX2 or newer, in whole rows on arm64 with dot products, and not at all elsewhere, so logits "
                "differ a little there; train with pass int4.accuracy_level 0 (the default) for equal ones everywhere"
            )
        return f"not portable: {'; '.join(said)}" if said else None


def portability(path: str | Path) -> Portability:
    """The bound of every u8 x s8 product of an ONNX file; unsigned weights take kernels that add in 32 bits."""
    import onnx

    model = onnx.load(str(path))
    folder = str(Path(path).parent)
    values = {one.name: one for one in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def array(name: str) -> np.ndarray | None:
        tensor = values.get(name)
        return None if tensor is None else onnx.numpy_helper.to_array(tensor, folder)

    found, rounded = [], []
    for node in model.graph.node:
        for name, weight in _weights(node, producers, array):
            if weight is None or weight.dtype == np.int8:
                found.append(PairSum(name, None if weight is None else largest_pair_sum(weight)))
        if node.op_type == "MatMulNBits" and _attribute(node, "accuracy_level") == ROUNDED:
            rounded.append(_layer(node, node.input[1]))
    return Portability(tuple(found), tuple(rounded))


def model_portability(model: nn.Module) -> Portability:
    """The same of the file that a finalised torch model becomes."""
    found, rounded = [], []
    for path, module in model.named_modules():
        quantizer = module.quantizer if isinstance(module, CompressedLinear) else None
        if isinstance(quantizer, Int8Quantizer):
            weight = module.effective_weight().detach()  # type: ignore[operator]
            integers = quantise_weight(weight, quantizer.weight_scale(weight))
            found.append(PairSum(path, largest_pair_sum(integers.t().to(torch.int8).cpu().numpy())))
        elif isinstance(quantizer, Int4Quantizer) and quantizer.accuracy_level == ROUNDED:
            rounded.append(path)
    return Portability(tuple(found), tuple(rounded))


def largest_pair_sum(weight: np.ndarray) -> int:
    """Of an (..., in, out) s8 weight: 255 times the largest sum of rows 2k and 2k + 1, each sign by itself."""
    if weight.size == 0:
        return 0
    integers = weight.astype(np.int32).reshape(-1, *weight.shape[-2:])
    if integers.shape[1] % 2:
        integers = np.pad(integers, ((0, 0), (0, 1), (0, 0)))
    first, second = integers[:, 0::2], integers[:, 1::2]
    highest = np.maximum(first, 0) + np.maximum(second, 0)
    lowest = np.minimum(first, 0) + np.minimum(second, 0)
    return ACTIVATION * int(max(highest.max(), -lowest.min()))


def _weights(
    node: NodeProto, producers: Mapping[str, NodeProto], array: Callable[[str], np.ndarray | None]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """(name, integers or None) of the weight of one integer product, if the node is one."""
    if node.op_type in PRODUCTS:
        name = node.input[PRODUCTS[node.op_type]]
        weight = array(name)
        transposed = node.op_type == "QGemm" and _attribute(node, "transB")
        yield _layer(node, name), weight.T if transposed and weight is not None else weight
    elif node.op_type in FLOATING:
        sources = [producers.get(name) for name in node.input[:2]]
        if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            name = sources[1].input[0]  # type: ignore[union-attr]
            weight = array(name)
            # Two activations, as in attention, are u8 x u8.
            if weight is not None:
                yield _layer(node, name), weight.T if _attribute(node, "transB") else weight


def _attribute(node: NodeProto, name: str) -> int:
    return next((one.i for one in node.attribute if one.name == name), 0)


def _layer(node: NodeProto, weight: str) -> str:
    """The module that a weight came from, as its name says, else the node's."""
    stem = weight
    for ending in (".qkv_weight", ".weight"):
        stem = stem.removesuffix(ending)
    return stem if stem != weight else node.name or weight
