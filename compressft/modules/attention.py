"""The attention functions registered with transformers: "compressft" for training, "compressft_onnx" for export.

Model code is never patched: a model whose config names one of them calls it through AttentionInterface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TRAINING = "compressft"
EXPORT = "compressft_onnx"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; query (B, Hq, T, D), key and value (B, Hkv, S, D), boolean mask (B, 1, T, S).

    Grouped-query heads and causality are SDPA's. Returns (B, T, Hq, D) and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def onnx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same as one `com.microsoft::MultiHeadAttention` node; only meaningful while exporting.

    `attention_mask` is the (B, S) int32 padding mask. K/V heads of grouped-query models are repeated.
    """
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    q, k, v = (t.transpose(1, 2).flatten(2) for t in (query, key, value))
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    attributes: dict[str, Any] = {"num_heads": int(heads), "unidirectional": int(causal)}
    if scaling is not None:
        attributes["scale"] = float(scaling)
    inputs = [q, k, v, None] if attention_mask is None else [q, k, v, None, attention_mask]
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention", inputs, attributes, dtype=q.dtype, shape=q.shape, version=1
    )
    return out.view(batch, length, heads, head_dim), None


def padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
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
