"""What the quantising passes share: which layers and tables they take, and the fields that say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from compressft.model.anatomy import anatomy
from compressft.model.surgery import compress_linear, replace, take_hooks
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained
from compressft.modules.quantizer import Quantizer, TableQuantizer
from compressft.passes.shared.select import LINEARS, layer_linears
from compressft.transform import Claim, Resource

PARTS = (*LINEARS, "pooler", "embeddings")
Tables = Literal["int8", "int4", "none"]
TableBlock = Literal[32, 64, 128]
ROUNDS = Claim(Resource.ARITHMETIC, "quantises the layers")
BITS: dict[str, int] = {"int8": 8, "int4": 4}


def quantised_linears(model: nn.Module, exclude: Sequence[str]) -> list[str]:
    """Paths of the layers' linear projections and of the pooler's, less what `exclude` names."""
    paths = layer_linears(model, exclude)
    parts = anatomy(model)
    pooler = parts.path(f"{parts.family.pooler}.dense") if parts.family.pooler else None
    excluded = bool({"pooler", pooler} & set(exclude))
    if pooler and not excluded and getattr(parts.backbone, "pooler", None) is not None:
        paths.append(pooler)
    return paths


def compress_tables(model: nn.Module, tables: Tables, block: int, exclude: Sequence[str]) -> None:
    """Make the embedding tables `CompressedEmbedding`s of these bits, less what `exclude` names.

    Four bits are for the tokens' table: onnxruntime unpacks int4 row by row, which the small tables' bytes do not pay.
    An output layer tied to it multiplies by the same rounded rows, unless `exclude` names it.

    Args:
        block: values of a row that share a scale in int4.
    """
    if tables == "none" or "embeddings" in exclude:
        return
    parts = anatomy(model)
    for number, relative in enumerate(parts.family.embedding_tables):
        if parts.path(relative) not in exclude:
            table = parts.backbone.get_submodule(relative)
            assert isinstance(table, nn.Embedding)
            bits = BITS[tables] if number == 0 else BITS["int8"]
            new = CompressedEmbedding.of(table, bits, block)
            replace(model, parts.path(relative), new)
            if number == 0:
                _follow_table(model, new, exclude)


def _follow_table(model: nn.Module, table: CompressedEmbedding, exclude: Sequence[str]) -> None:
    """Let an output layer that shares the tokens' table multiply by the rounded rows: the table ships once."""
    head = pretrained(model).get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if head is None or path is None or head.weight is not table.weight or path in exclude:
        return
    new = compress_linear(model, path)
    # Such as of an invertible adapter, whose inverse stands in front of it.
    take_hooks(head, new)
    assert table.bits is not None
    new.quantizer = TableQuantizer(table.bits, table.block)
    new.quantizer.table = (table,)


def quantizers(model: nn.Module) -> list[Quantizer]:
    """The quantizers in the model's linear layers."""
    return [m.quantizer for m in model.modules() if isinstance(m, CompressedLinear) and m.quantizer is not None]


def follow(model: nn.Module, active: bool, rate: float) -> None:
    """Switch quantisation of layers and tables, and set the share of the weights that is rounded."""
    for quantizer in quantizers(model):
        quantizer.active, quantizer.rate = active, rate
    for module in model.modules():
        if isinstance(module, CompressedEmbedding):
            module.active = active


def rate(progress: float, start: float, end: float) -> float:
    """Share of the weights that is rounded: 0 at `start`, 1 from `end` on."""
    return 1.0 if progress >= end else max(0.0, (progress - start) / (end - start))


def settle(model: nn.Module) -> None:
    """Everything is quantised from here on, and nothing is learned."""
    follow(model, True, 1.0)
    for quantizer in quantizers(model):
        quantizer.settle()
