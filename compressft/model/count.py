"""How many parameters a model has, and how many weights act."""

from __future__ import annotations

import torch
from torch import nn

from compressft.modules.linear import CompressedLinear


@torch.no_grad()
def live_weights(model: nn.Module) -> int:
    """Weights of linear layers that act: not zero behind their gates."""
    total = 0
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            total += int(torch.count_nonzero(module.effective_weight()))
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            total += int(torch.count_nonzero(module.weight))  # type: ignore[arg-type]
    return total


def count(model: nn.Module) -> dict[str, int]:
    """Parameters: total, trainable, nonzero."""
    parameters = list(model.parameters())
    return {
        "total": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "nonzero": sum(int(torch.count_nonzero(p)) for p in parameters),
    }
