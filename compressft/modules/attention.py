"""The attention functions registered with transformers: "compressft" for training, "compressft_onnx" for export.

Model code is never patched: a model whose config names one of them calls it through AttentionInterface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.modules.current import Current
from compressft.modules.dense_attention import Call, Options, attend
from compressft.modules.linear import is_bare
from compressft.modules.lsh import Lsh
from compressft.modules.prefix import Front, attention_with_prefix

TRAINING = "compressft"
EXPORT = "compressft_onnx"


@dataclass(frozen=True)
class Attended:
    """What one attention call was given, a prefix's keys and values left out.

    query (B, Hq, T, D), key and value (B, Hkv, T, D) with their graphs, mask boolean (B or 1, 1, T, T) or None where
    only `causal` says who sees whom, and the factor `scaling` on the products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float


class Recorder:
    """Keeps what the attention calls of some modules are given: `taken` by the number given to each module."""

    def __init__(self, modules: Mapping[nn.Module, int]) -> None:
        self.modules = modules
        self.taken: dict[int, Attended] = {}

    def take(self, module: nn.Module, call: Call) -> None:
        """Called by `attention`; other modules' calls are passed over."""
        number = self.modules.get(module)
        if number is None:
            return
        query, key, value, mask, options = call
        length = query.shape[2]
        causal = options.get("is_causal")
        scaling = options.get("scaling")
        self.taken[number] = Attended(
            query,
            key[:, :, -length:],
            value[:, :, -length:],
            None if mask is None else mask[..., -length:],
            getattr(module, "is_causal", True) if causal is None else causal,
            query.shape[-1] ** -0.5 if scaling is None else scaling,
        )


_recorder: Current[Recorder | None] = Current(None)


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """Inside, `attention` shows its calls to `recorder` (None: to nobody).

    A layer that gradient checkpointing computes again in the backward pass is outside, so nothing is taken twice.
    """
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def prefix_of(module: nn.Module) -> Front | None:
    """The prefix of an attention module, None where it has none."""
    prefix = getattr(module, "prefix", None)
    return prefix if isinstance(prefix, Front) else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Unpack[Options],
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; query (B, Hq, T, D), key and value (B, Hkv, S, D), boolean mask (B, 1, T, S).

    Grouped-query heads and causality are SDPA's, whose place `attend` takes where that is slow. Returns (B, T, Hq, D)
    and no weights. What distillation wants of the scores it computes from what a `recording` kept. A module's child
    `prefix` puts its keys and values in front; a child `lsh` takes SDPA's place.
    """
    call = Call(query, key, value, attention_mask, options)
    recorder = _recorder.get()
    if recorder is not None:
        recorder.take(module, call)
    lsh = getattr(module, "lsh", None)
    if isinstance(lsh, Lsh) and not is_bare():
        return lsh(module, call)
    prefix = prefix_of(module)
    if prefix is not None and not is_bare():
        return attention_with_prefix(prefix, module, call)
    return attend(module, query, key, value, attention_mask, **options)


def onnx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Unpack[Options],
) -> tuple[Tensor, None]:
    """The same as one `com.microsoft::MultiHeadAttention` node; only meaningful while exporting.

    `attention_mask` is the (B, S) int32 padding mask. K/V heads of grouped-query models are repeated; with keys of
    earlier tokens in front (a cache) their query heads become queries instead, so that no step copies the cache. A
    prefix is joined to the keys and values before the node. A sliding window is a bias, which the node has no
    attribute for, and so is causality behind a cache or a prefix; a bias by position (T5) is added to it.

    Raises:
        UserError: the model hashes its queries, which no node of onnxruntime does.
    """
    # It imports sympy.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if isinstance(getattr(module, "lsh", None), Lsh):
        raise UserError("export: attention over hashed buckets (method lsh_attention) has no ONNX form; ship model/")
    batch, heads, length, head_dim = query.shape
    is_causal, scaling = options.get("is_causal"), options.get("scaling")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    bias, prefix, window = options.get("position_bias"), prefix_of(module), options.get("sliding_window")
    own, size = key.shape[2], 0
    cached = not statically_known_true(own == length)
    if cached and attention_mask is not None:
        # The same size, of one tensor that all layers are given: their biases are recognised as one.
        own = attention_mask.shape[1]
    if prefix is not None:
        key, value = prefix.joined(key, value)
        size = prefix()[0].shape[1]
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (size, 0), value=1)
        if bias is not None:
            bias = F.pad(bias, (size, 0))
    if causal and (prefix is not None or window is not None or bias is not None or cached):
        # `unidirectional` lets query t see the first t + 1 keys, the prefix counted.
        hidden = causal_bias(query, own, size, window)
        bias, causal = hidden if bias is None else bias + hidden, False
    groups = heads // key.shape[1]
    attributes: dict[str, float] = {"num_heads": int(heads), "unidirectional": int(causal)}
    if scaling is not None:
        attributes["scale"] = float(scaling)
    if cached:
        attributes["num_heads"] = int(key.shape[1])
        queries = query.unflatten(1, (-1, groups)).flatten(2, 3).transpose(1, 2).flatten(2)
        repeated = None if bias is None else bias.repeat(1, 1, groups, 1)
        out = _attention_node([queries, key, value, None, attention_mask, repeated], attributes)
        out = out.view(batch, groups, length, key.shape[1], head_dim)
        return out.permute(0, 2, 3, 1, 4).flatten(2, 3), None
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    q, k, v = (t.transpose(1, 2).flatten(2) for t in (query, key, value))
    return _attention_node([q, k, v, None, attention_mask, bias], attributes).view(batch, length, heads, head_dim), None


def _attention_node(inputs: list[Tensor | None], attributes: Mapping[str, float]) -> Tensor:
    """The node's output, of the shape of its queries (B, T, heads * head_dim)."""
    while inputs[-1] is None:
        inputs.pop()
    queries = inputs[0]
    assert queries is not None
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention", inputs, {**attributes}, dtype=queries.dtype, shape=queries.shape, version=1
    )


def causal_bias(query: Tensor, keys: int, size: int, window: int | None = None) -> Tensor:
    """(1, 1, T, P + S): 0 for the prefix and for own keys that a query sees, the least number for the others.

    Args:
        query: (B, H, T, D), the last T of the keys' places.
        keys: S. size: P, always seen.
        window: so many keys up to the query's place are seen; None: all of them.
    """
    place = torch.arange(keys - query.shape[2], keys, device=query.device)[:, None]
    other = torch.arange(-size, keys, device=query.device)
    hidden = other > place
    if window is not None:
        hidden = hidden | ((other >= 0) & (other <= place - window))
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(hidden, torch.finfo(query.dtype).min, zero)[None, None]


def padding_mask(attention_mask: Tensor | None = None, **kwargs: object) -> Tensor | None:
    """Mask function of the export path: the (B, S) padding mask itself, int32 (the runtime adds causality)."""
    return None if attention_mask is None else attention_mask.to(torch.int32)


def register() -> None:
    """Make both names known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(TRAINING, attention)
    AttentionMaskInterface.register(TRAINING, sdpa_mask)
    AttentionInterface.register(EXPORT, onnx_attention)
    AttentionMaskInterface.register(EXPORT, padding_mask)
