"""Floating-point operations of a forward pass, counted from the shapes that a model has now."""

from __future__ import annotations

from torch import nn

from compressft.model.anatomy import Layer, anatomy, linear_shape
from compressft.modules.attention import prefix_of
from compressft.modules.bottleneck import BottleneckLayers
from compressft.modules.fusion import AdapterFusion
from compressft.modules.lsh import Lsh
from compressft.modules.side import SideNetwork

# Tokens of the example that reports count.
FLOPS_LENGTH = 128


def flops(model: nn.Module, length: int) -> int:
    """Operations (a multiplication and an addition are two) of one example of `length` tokens.

    Counted are matrix products: linear layers, what methods add, and attention's two products over all pairs of tokens,
    and of tokens and a prefix (also where a causal mask or paddings would let a kernel leave some out), or, where
    tokens are hashed, over the pairs in the chunks of every round. Lookups, norms, activations and sorting are not.
    """
    parts = anatomy(model)
    total = sum(_layer(layer, length) for layer in parts.layers)
    pooler = f"{parts.path(parts.family.pooler)}." if parts.family.pooler else None
    # Encoders classify a row by one token, decoders compute every token's scores and pick one.
    pooled = "SequenceClassification" in type(model).__name__ and not parts.family.causal
    done = [f"{layer.name}." for layer in parts.layers]
    for path, module in model.named_modules():
        if isinstance(module, SideNetwork):
            total += flops(module.network, length)
            done.append(f"{path}.network.")
        elif isinstance(module, BottleneckLayers):
            total += 2 * (module.down_weight.numel() + module.up_weight.numel()) * length
        elif isinstance(module, AdapterFusion):
            square, adapters, biases = (x.numel() for x in (module.query_weight, module.up_weight, module.up_bias))
            total += 2 * (3 * square + 3 * adapters + 2 * biases) * length
        elif path.startswith(tuple(done)):
            continue
        elif isinstance(module, nn.LSTM):
            total += 2 * sum(weight.numel() for weight in module.parameters() if weight.dim() == 2) * length
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            rows, columns = linear_shape(module)
            head = not parts.prefix or not path.startswith(f"{parts.prefix}.")
            once = (pooler is not None and path.startswith(pooler)) or (head and pooled)
            total += 2 * rows * columns * (1 if once else length)
    return total


def _layer(layer: Layer, length: int) -> int:
    """One transformer layer's projections and attention."""
    total = 0
    for path in layer.linears:
        rows, columns = linear_shape(layer.part(path))
        total += 2 * rows * columns * length
    site = layer.part(layer.family.attention)
    lsh = getattr(site, "lsh", None)
    if isinstance(lsh, Lsh):
        rounds, half = lsh.rotations.shape[1], lsh.rotations.shape[3]
        whole = length + -length % lsh.chunk
        pairs = rounds * whole * (lsh.look_back + 1) * lsh.chunk
        return total + 2 * layer.heads * layer.head_dim * (2 * pairs + rounds * half * length)
    prefix = prefix_of(site)
    keys = length if prefix is None else length + prefix()[0].shape[1]
    return total + 2 * 2 * layer.heads * layer.head_dim * length * keys
