"""The key/value cache of an exported language model: sample inputs to trace with, and the names that readers expect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from compressft.export.nodes import name_of, shape_of
from compressft.recipe.recipe import Recipe
from compressft.tasks import TASKS

if TYPE_CHECKING:
    import onnx_ir as ir

# Axis of a tensor -> what may vary there, as torch.export takes it.
Axes: TypeAlias = "Mapping[int, object]"
PAST, PRESENT = "past_key_values", "present"
# Tokens in the past that is traced with: as with the batch and the length, 0 or 1 would be taken for constants.
TRACED_PAST = 3
# transformers names the tensors of a cache "past_key_values.layers.0.keys", with this in front where it is an input.
_TENSOR = re.compile(r"(input\.|output\.)?past_key_values\.layers\.(\d+)\.(key|value)s")


def has_cache(recipe: Recipe) -> bool:
    """Whether the file that a recipe exports takes and gives keys and values."""
    return TASKS[recipe.shipped.task.type].caches and recipe.export.cache


@torch.no_grad()
def with_cache(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, object]:
    """A sample batch (B, T) with the places of its tokens and a cache of `TRACED_PAST` earlier ones.

    Args:
        model: as it was trained; what a deployed one has for its layers does not run in torch.

    Returns:
        `input_ids` and `position_ids` (B, T), `attention_mask` (B, past + T) and `past_key_values`, a DynamicCache of
        every layer that keeps something, side networks' too.
    """
    from transformers import DynamicCache

    ids = batch["input_ids"]
    rows, length = ids.shape
    mask = ids.new_ones(rows, TRACED_PAST)
    first = ids[:, :1].expand(-1, TRACED_PAST)
    # Not of the configuration's kind: a window's layers would forget, and it is the mask that makes the window.
    cache = DynamicCache()
    model.eval()(input_ids=first, attention_mask=mask, past_key_values=cache, use_cache=True)
    return {
        "input_ids": ids,
        "attention_mask": torch.cat([mask, batch["attention_mask"]], dim=1),
        "position_ids": torch.arange(TRACED_PAST, TRACED_PAST + length).expand(rows, -1).clone(),
        PAST: cache,
    }


def dynamic_axes(value: object) -> Axes | Sequence[Axes]:
    """Which axes of a sample input may have any size: batch and length, and a cache's batch and past."""
    from transformers import DynamicCache

    free = torch.export.Dim.AUTO
    if isinstance(value, Tensor):
        return {0: free, 1: free}
    assert isinstance(value, DynamicCache)
    return [{0: free, 2: free} for _ in range(2 * len(value.layers))]


def name_cache(model: ir.Model) -> None:
    """Name a graph's cache as optimum, transformers.js and onnxruntime-genai do, and the axes of all inputs.

    `past_key_values.N.key` and `.value` (batch, heads, past, size) go in, `present.N.key` and `.value` come out.
    """
    import onnx_ir

    for values, stem, length in (
        (model.graph.inputs, PAST, "past_sequence_length"),
        (model.graph.outputs, PRESENT, "total_sequence_length"),
    ):
        for value in values:
            found = _TENSOR.fullmatch(name_of(value))
            if found is not None:
                value.name = f"{stem}.{found[2]}.{found[3]}"
                value.shape = onnx_ir.Shape(["batch_size", shape_of(value)[1], length, shape_of(value)[3]])
            elif value.name == "attention_mask":
                value.shape = onnx_ir.Shape(["batch_size", "total_sequence_length"])
            else:
                value.shape = onnx_ir.Shape(["batch_size", "sequence_length", *shape_of(value)[2:]])
