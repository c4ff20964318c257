"""The deployed form of a trained model: the one place that says what each kind of compressed module ships as."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from compressft.export.int4 import Int4Embedding, Int4Linear
from compressft.export.int8 import Int8Embedding, Int8Linear, QdqLinear
from compressft.model import replace
from compressft.modules.attention import EXPORT, TRAINING
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer, Int8Quantizer


class Adapted(nn.Module):
    """A deployed layer followed by the adapter of its slot."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.inner(x))


def fold(model: nn.Module) -> nn.Module:
    """A copy of a finalised model in which every compressed module has its deployed form, ready to be exported.

    Where a layer asks for the format "qdq", the graph keeps to standard ONNX operators, attention and tables included.
    """
    deployed = copy.deepcopy(model).eval().requires_grad_(False)
    portable = any(isinstance(m, Int8Quantizer) and m.format == "qdq" for m in deployed.modules())
    for path, module in list(deployed.named_modules()):
        if isinstance(module, CompressedLinear):
            replace(deployed, path, deployed_linear(module))
        elif isinstance(module, CompressedEmbedding):
            replace(deployed, path, deployed_table(module, portable))
    # In training's own function all is plain torch, a prefix included.
    deployed.config._attn_implementation = TRAINING if portable else EXPORT  # type: ignore[union-attr]
    return deployed


def deployed_table(table: CompressedEmbedding, portable: bool) -> nn.Module:
    """What an embedding table ships as, without the rows that nothing looks up."""
    if table.first:
        table.fold()
    if table.bits is None:
        return table.restore()
    return Int4Embedding(table, portable) if table.bits == 4 else Int8Embedding(table)


def deployed_linear(linear: CompressedLinear) -> nn.Module:
    """What a linear layer ships as; its gates and delta are folded, its slots emptied."""
    linear.fold()
    adapter, linear.adapter = linear.adapter, None
    quantizer = linear.quantizer
    if quantizer is None:
        new = linear.restore()
    elif isinstance(quantizer, Int4Quantizer):
        new = Int4Linear(linear)
    elif isinstance(quantizer, Int8Quantizer):
        new = QdqLinear(linear) if quantizer.format == "qdq" else Int8Linear(linear)
    else:
        raise ValueError(f"fold: no deployed form of {type(quantizer).__name__}")
    return new if adapter is None else Adapted(new, adapter)
