"""The hard-concrete distribution: gates in [0, 1] that can be exactly 0 and still have a gradient.

Louizos, Welling & Kingma (2018), section 2.2: a sigmoid of logistic noise, stretched to (low, high), clipped to [0, 1].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Movement pruning's L0 variant and CoFi; other papers use others.
TEMPERATURE = 2.0 / 3.0
LOW = -0.1
HIGH = 1.1
# The uniform noise stays this far from 0 and 1, where its logit is infinite.
EDGE = 1e-6


def sample(log_alpha: Tensor, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH) -> Tensor:
    """One gate per `log_alpha`, differentiable in it; shape and dtype as `log_alpha`, noise from the global generator.

    Equations 10 and 11 of the paper: clip(low + (high - low) * sigmoid((logit(u) + log_alpha) / temperature)).
    """
    u = torch.empty_like(log_alpha).uniform_(EDGE, 1.0 - EDGE)
    return _stretch(torch.sigmoid((torch.logit(u) + log_alpha) / temperature), low, high)


def deterministic(log_alpha: Tensor, low: float = LOW, high: float = HIGH, temperature: float = 1.0) -> Tensor:
    """The gates without noise: clip(low + (high - low) * sigmoid(log_alpha / temperature)), equation 13 for 1.0."""
    return _stretch(torch.sigmoid(log_alpha / temperature), low, high)


def open_probability(
    log_alpha: Tensor, temperature: float = TEMPERATURE, low: float = LOW, high: float = HIGH
) -> Tensor:
    """P(sample > 0) = sigmoid(log_alpha - temperature * ln(-low / high)), equation 12: what an L0 penalty adds up."""
    return torch.sigmoid(log_alpha - temperature * math.log(-low / high))


def _stretch(s: Tensor, low: float, high: float) -> Tensor:
    return (low + (high - low) * s).clamp(0.0, 1.0)
