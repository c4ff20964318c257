"""Floating-point operations of a forward pass, counted from the shapes that a model has now."""

from __future__ import annotations

from torch import nn

from compressft.anatomy import anatomy, linear_shape
from compressft.modules.attention import prefix_of
from compressft.modules.bottleneck import Bottleneck

# Tokens of the example that reports count.
FLOPS_LENGTH = 128


def flops(model: nn.Module, length: int) -> int:
    """Operations (a multiplication and an addition are two) of one example of `length` tokens.

    Counted are matrix products: linear layers, adapters, and attention's two products over all pairs of tokens, and of
    tokens and a prefix (also where a causal mask or paddings would let a kernel leave some out). Lookups, norms and
    activations are not.
    """
    parts = anatomy(model)
    inside = tuple(f"{layer.name}." for layer in parts.layers)
    total = 0
    for layer in parts.layers:
        for path in layer.linears:
            rows, columns = linear_shape(layer.part(path))
            total += 2 * rows * columns * length
        prefix = prefix_of(layer.part(layer.family.attention))
        keys = length if prefix is None else length + prefix()[0].shape[1]
        total += 2 * 2 * layer.heads * layer.head_dim * length * keys
    pooler = f"{parts.path(parts.family.pooler)}." if parts.family.pooler else None
    # Encoders classify a row by one token, decoders compute every token's scores and pick one.
    pooled = "SequenceClassification" in type(model).__name__ and not parts.family.causal
    for path, module in model.named_modules():
        if isinstance(module, Bottleneck):
            total += 2 * (module.down_weight.numel() + module.up_weight.numel()) * length
        elif not path.startswith(inside) and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            rows, columns = linear_shape(module)
            head = not parts.prefix or not path.startswith(f"{parts.prefix}.")
            once = (pooler is not None and path.startswith(pooler)) or (head and pooled)
            total += 2 * rows * columns * (1 if once else length)
    return total
