"""The deployed form of a trained model: the one place that says what each kind of compressed module ships as."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from compressft.export.int4 import Int4Embedding, Int4Linear
from compressft.export.int8 import Int8Embedding, Int8Linear, QdqLinear
from compressft.model.surgery import replace, take_hooks
from compressft.modules.attention import EXPORT, TRAINING
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer, Int8Quantizer, TableQuantizer


class WithAdapter(nn.Module):
    """A deployed layer followed by the adapter of its slot."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.inner(x))


class TableLinear(nn.Module):
    """An output layer that multiplies by the embedding table as it ships, which is in the file once."""

    def __init__(self, table: Int4Embedding | Int8Embedding, bias: Tensor | None) -> None:
        super().__init__()
        # In a tuple: its tensors are the embedding's.
        self.table = (table,)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.table[0].product(x, self.bias if isinstance(self.bias, Tensor) else None)


def fold(model: nn.Module) -> nn.Module:
    """A copy of a finalised model in which every compressed module has its deployed form, ready to be exported.

    Where a layer asks for the format "qdq", the graph keeps to standard ONNX operators, attention and tables included.
    """
    deployed = copy.deepcopy(model).eval().requires_grad_(False)
    portable = any(isinstance(m, Int8Quantizer) and m.format == "qdq" for m in deployed.modules())
    heads = [
        m for m in deployed.modules() if isinstance(m, CompressedLinear) and isinstance(m.quantizer, TableQuantizer)
    ]
    # By the weight that they share; what multiplies by it is made after it.
    tables: dict[Tensor, nn.Module] = {}
    for path, module in list(deployed.named_modules()):
        if isinstance(module, CompressedEmbedding):
            shared = module.weight
            tables[shared] = deployed_table(module, portable, any(head.weight is shared for head in heads))
            replace(deployed, path, tables[shared])
    for path, module in list(deployed.named_modules()):
        if isinstance(module, CompressedLinear):
            new = deployed_linear(module, tables)
            take_hooks(module, new)
            replace(deployed, path, new)
    # In training's own function all is plain torch, a prefix included.
    deployed.config._attn_implementation = TRAINING if portable else EXPORT  # type: ignore[union-attr]
    return deployed


def deployed_table(table: CompressedEmbedding, portable: bool, multiplied: bool = False) -> nn.Module:
    """What an embedding table ships as, without the rows that nothing looks up.

    Args:
        multiplied: an output layer reads it too.
    """
    if table.first:
        table.fold()
    if table.bits is None:
        return table.restore()
    return Int4Embedding(table, portable, multiplied) if table.bits == 4 else Int8Embedding(table)


def deployed_linear(linear: CompressedLinear, tables: Mapping[Tensor, nn.Module] | None = None) -> nn.Module:
    """What a linear layer ships as; its gates and delta are folded, its slots emptied.

    Args:
        tables: what the embedding tables ship as, by their weight.
    """
    linear.fold()
    adapter, linear.adapter = linear.adapter, None
    quantizer = linear.quantizer
    if quantizer is None:
        new = linear.restore()
    elif isinstance(quantizer, Int4Quantizer):
        new = Int4Linear(linear)
    elif isinstance(quantizer, Int8Quantizer):
        new = QdqLinear(linear) if quantizer.format == "qdq" else Int8Linear(linear)
    elif isinstance(quantizer, TableQuantizer):
        table = (tables or {})[linear.weight]
        assert isinstance(table, Int4Embedding | Int8Embedding)
        new = TableLinear(table, linear.bias)
    else:
        raise ValueError(f"fold: no deployed form of {type(quantizer).__name__}")
    return new if adapter is None else WithAdapter(new, adapter)
