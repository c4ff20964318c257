"""The bottleneck adapter in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft_kernels.nf4 import NF4, dense
from compressft_kernels.reference.operands import autocast_dtype, describe

# gamma and beta (d,), and eps, of a LayerNorm.
Norm = tuple[Tensor, Tensor, float]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

# Activation -> its gradient from that of its result and its argument.
SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward.default,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.default, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward.default, threshold=0),
    "silu": torch.ops.aten.silu_backward.default,
    "tanh": lambda dh, z: torch.ops.aten.tanh_backward.default(dh, z.tanh()),
}


def check_adapter(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, up_bias: Tensor | None,
    activation: str, residual: Tensor | None, norm: Norm | None,
) -> None:  # fmt: skip
    """Raises what `adapter` documents."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"adapter: activation {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    gamma, beta = norm[:2] if norm is not None else (None, None)
    weights = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    fits = x.dim() >= 1 and down_weight.dim() == 2 and up_weight.dim() == 2
    if fits:
        (size, width), out = down_weight.shape, up_weight.shape[0]
        fits = x.shape[-1] == width and up_weight.shape[1] == size
        fits = fits and (down_bias is None or down_bias.shape == (size,))
        fits = fits and (up_bias is None or up_bias.shape == (out,))
        fits = fits and (residual is None or residual.shape == (*x.shape[:-1], out))
        fits = fits and all(t is None or t.shape == (width,) for t in (gamma, beta))
    if not fits:
        given = describe(x=x, **weights, residual=residual, gamma=gamma, beta=beta)
        raise ValueError(
            f"adapter: {given} do not fit; want x (..., d), down_weight (r, d), down_bias (r,), up_weight (out, r), "
            "up_bias (out,), residual (..., out), gamma and beta (d,)"
        )
    dtypes = {key: t.dtype for key, t in {"x": x, **weights}.items() if t is not None}
    if not x.is_floating_point() or (autocast_dtype(x) is None and len(set(dtypes.values())) > 1):
        named = ", ".join(f"{key} {dtype}" for key, dtype in dtypes.items())
        raise ValueError(f"adapter: {named}; want one floating dtype for all")


def adapter(
    x: Tensor,
    down_weight: Tensor | NF4,
    down_bias: Tensor | None,
    up_weight: Tensor | NF4,
    up_bias: Tensor | None,
    *,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """Bottleneck adapter: y = residual + scale * (act(norm(x) W_d^T + b_d) W_u^T + b_u).

    Gradients for x, the residual, dense weights, biases and the norm. The kernel saves x, the pre-activation and the
    norm's row statistics for backward.

    Args:
        x: (..., d), floating.
        down_weight, down_bias: (r, d), (r,); x's dtype (under autocast any), or `NF4` weights.
        up_weight, up_bias: (out, r), (out,); likewise.
        activation: one of `ACTIVATIONS`.
        residual: (..., out), added to the result; may be x.
        norm: (gamma, beta, eps) of a LayerNorm over d applied to x first.

    Returns:
        (..., out), x's dtype, promoted with the residual's (under autocast, autocast's for x's).

    Raises:
        ValueError: shapes or dtypes that do not fit (named in the message) or an unknown activation.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019), section 2.1.
    """
    dtype = autocast_dtype(x) or x.dtype
    down_weight, up_weight = dense(down_weight, dtype), dense(up_weight, dtype)
    check_adapter(x, down_weight, down_bias, up_weight, up_bias, activation, residual, norm)
    act = ACTIVATIONS[activation]

    def normed() -> Tensor:
        return x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)

    # No name holds an intermediate longer than it is needed: the next one then finds its memory in cache.
    y = F.linear(act(F.linear(normed(), down_weight, down_bias)), up_weight, up_bias)
    if residual is not None:
        return torch.add(residual, y, alpha=scale) if scale != 1.0 else residual + y
    return y * scale if scale != 1.0 else y


def adapter_gradients(
    dy: Tensor, x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor, gamma: Tensor | None,
    beta: Tensor | None, eps: float, activation: str, scale: float, residual_is_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, down weight, down bias, up weight, up bias, gamma and beta.

    Without autograd, which records nothing within an operator.

    Args:
        dy: (T, out), the gradient of `adapter`'s result; x (T, d); all of one dtype, without autocast.
        residual_is_x: the residual was x; another one's gradient is dy.
    """
    width, d_gamma, d_beta = [x.shape[1]], None, None
    normed, mean, rstd = x, None, None
    if gamma is not None:
        normed, mean, rstd = torch.ops.aten.native_layer_norm(x, width, gamma, beta, eps)
    z = F.linear(normed, down_weight, down_bias)
    slope = dy * scale
    dz = SLOPES[activation](slope @ up_weight, z)
    dx = dz @ down_weight
    if gamma is not None:
        dx, d_gamma, d_beta = torch.ops.aten.native_layer_norm_backward(
            dx, x, width, mean, rstd, gamma, beta, [True, True, True]
        )
    if residual_is_x:
        dx = dx + dy
    return dx, dz.t() @ normed, dz.sum(0), slope.t() @ ACTIVATIONS[activation](z), slope.sum(0), d_gamma, d_beta
