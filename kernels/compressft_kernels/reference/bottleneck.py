"""The bottleneck adapter in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Bottleneck adapter: y = residual + scale * (act(norm(x) W_d^T + b_d) W_u^T + b_u).

    Args:
        x: (..., d).
        down_weight, down_bias: (r, d), (r,).
        up_weight, up_bias: (d, r), (d,).
        activation: one of `ACTIVATIONS`.
        residual: (..., d), added to the result.
        norm: (gamma, beta, eps) of a LayerNorm applied to x first.

    Raises:
        ValueError: shapes that do not fit (named in the message) or an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"adapter: activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    size, width = down_weight.shape
    if x.shape[-1] != width or up_weight.shape[1] != size:
        raise ValueError(
            f"adapter: x {tuple(x.shape)}, down_weight {tuple(down_weight.shape)} and up_weight "
            f"{tuple(up_weight.shape)} do not fit; want (..., d), (r, d), (out, r)"
        )
    if norm is not None:
        gamma, beta, eps = norm
        x = F.layer_norm(x, (width,), gamma, beta, eps)
    hidden = ACTIVATIONS[activation](F.linear(x, down_weight, down_bias))
    y = F.linear(hidden, up_weight, up_bias)
    if scale != 1.0:
        y = y * scale
    return y if residual is None else residual + y
