"""Attention that writes its scores down: for training on CPU, where torch's own is slow.

There its fused kernel knows no dropout, and its backward pass in bf16 is slow; what takes over draws a double for every
score and multiplies in fp32. On GPUs and without gradients nothing beats the fused kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from compressft.modules.dropout import drop
from compressft.modules.last_input import LastInput

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

# Scores (B, H, T, S) of one layer beyond which the fused kernel's memory, linear in T, counts for more.
MOST_SCORES = 2**23

_masks = LastInput()


class Options(TypedDict, total=False):
    """What of a call's keyword arguments is read here; transformers gives more."""

    dropout: float
    scaling: float | None
    is_causal: bool | None
    position_bias: Tensor | None
    cache: PagedAttentionCache | None
    softcap: float | None
    sliding_window: int | None


class Call(NamedTuple):
    """What an attention function is called with besides its module.

    query (B, Hq, T, D), key and value (B, Hkv, S, D), mask boolean (B or 1, 1, T, S) or added, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Options


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Unpack[Options],
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`: the same arguments, the same result (B, T, Hq, D) but for rounding.

    Only a query that nothing may be seen by gets the mean of all values instead of 0.
    """
    if _pays(query, key, **options):
        return _dense(module, Call(query, key, value, attention_mask, options)), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _pays(
    query: Tensor, key: Tensor, dropout: float = 0.0, cache: object = None, softcap: float | None = None, **_: object
) -> bool:
    if query.device.type != "cpu" or torch.compiler.is_compiling() or cache is not None or softcap is not None:
        return False
    if dropout > 0.0:
        return True
    learns = torch.is_grad_enabled() and query.requires_grad
    return learns and _dtype(query) is torch.bfloat16 and query[..., 0].numel() * key.shape[2] <= MOST_SCORES


def _dtype(query: Tensor) -> torch.dtype:
    """What the values are multiplied in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def _dense(module: nn.Module, call: Call) -> Tensor:
    """Scores and softmax in fp32, shares and values in the compute dtype, as the fused kernels have it."""
    query, key, value, attention_mask, options = call
    position_bias, is_causal, scaling = options.get("position_bias"), options.get("is_causal"), options.get("scaling")
    dtype = _dtype(query)
    exact = torch.promote_types(dtype, torch.float32)
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None and length > 1:
        # Without a mask the first query is at the first key: what follows are empty places of a static cache.
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool).tril()
        position_bias = None if position_bias is None else position_bias[..., :length]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    with torch.autocast("cpu", enabled=False):
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = torch.matmul(query.to(exact) * factor, key.to(exact).transpose(-1, -2))
        if position_bias is not None:
            scores = scores + position_bias
        if attention_mask is not None:
            scores += _added(attention_mask, exact)
        shares = drop(scores.softmax(-1).to(dtype), options.get("dropout", 0.0))
        return torch.matmul(shares, value.to(dtype)).to(query.dtype).transpose(1, 2).contiguous()


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: itself, or the least number where a boolean one is False."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    least = torch.finfo(dtype).min
    # All layers are given the same one.
    return _masks.value(mask, dtype, lambda: torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, least))
