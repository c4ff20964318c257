"""CompressedLinear: everything that can happen to one weight meets here, in slots, not in nested wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.gate import ColumnGate
from compressft.modules.quantizer import Int8Quantizer, quantised_linear

_dense: ContextVar[bool] = ContextVar("compressft_dense", default=False)


@contextmanager
def dense() -> Iterator[None]:
    """Inside, gates and quantizers are off: the same weights act as the uncompressed model (the `self` teacher)."""
    token = _dense.set(True)
    try:
        yield
    finally:
        _dense.reset(token)


def is_dense() -> bool:
    """Whether `dense()` is in force."""
    return _dense.get()


class CompressedLinear(nn.Linear):
    """y = adapter(x W_eff^T + b) with W_eff = quantise(gate * (W + delta)).

    Slots (None when empty): `gate` (ColumnGate over input columns), `delta` (a module whose forward returns an
    (out, in) tensor), `quantizer` (Int8Quantizer), `adapter` (a module on the output). The parameters keep the names
    `weight` (out, in) and `bias` (out,) of the layer they came from. `transposed` remembers that it was a Conv1D,
    whose weight is stored (in, out).
    """

    gate: ColumnGate | None
    delta: nn.Module | None
    quantizer: Int8Quantizer | None
    adapter: nn.Module | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, transposed: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.transposed = transposed
        self.gate = None
        self.delta = None
        self.quantizer = None
        self.adapter = None

    @classmethod
    def of(cls, module: nn.Module) -> CompressedLinear:
        """Take over a Linear (sharing its parameters) or a Conv1D (transposing its weight); itself if it is one."""
        if isinstance(module, cls):
            return module
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        with torch.device("meta"):
            new = cls(columns, rows, bias=module.bias is not None, transposed=transposed)
        if transposed:
            weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
        new.weight = weight
        if module.bias is not None:
            new.bias = module.bias  # type: ignore[assignment]
        new.train(module.training)
        return new

    def effective_weight(self) -> Tensor:
        """gate * (W + delta), (out, in), before quantisation."""
        weight = self.weight
        if self.delta is not None:
            weight = weight + self.delta()
        if self.gate is not None and not is_dense():
            weight = weight * self.gate.columns()
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.effective_weight()
        quantizer = None if is_dense() else self.quantizer
        columns = None if self.gate is None or quantizer is None else self.gate.columns().detach()
        if quantizer is not None and self.training and quantizer.observing and not quantizer.dynamic:
            quantizer.observe(input, columns)
        if quantizer is not None and quantizer.ready:
            y = quantised_linear(input, weight, self.bias, *quantizer.scale(input, columns))
        else:
            y = F.linear(input, weight, self.bias)
        return y if self.adapter is None else self.adapter(y)

    @torch.no_grad()
    def fold(self) -> None:
        """Settle gate and delta into the weight (values only; `model.shrink` removes the dead columns)."""
        if self.delta is not None or self.gate is not None:
            self.weight.data = self.effective_weight().detach()
        self.gate = None
        self.delta = None

    def restore(self) -> nn.Module:
        """The plain layer this came from: nn.Linear, or Conv1D with its transposed weight.

        Raises:
            ValueError: a slot that a plain layer cannot hold is still filled.
        """
        filled = [slot for slot in ("gate", "delta", "quantizer", "adapter") if getattr(self, slot) is not None]
        if filled:
            raise ValueError(f"CompressedLinear.restore: slots {filled} are filled; fold or detach them first")
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                new: nn.Module = Conv1D(self.out_features, self.in_features)
            weight = self.weight.detach().t().contiguous()
            new.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        else:
            with torch.device("meta"):
                new = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            new.weight = self.weight
        if self.bias is not None:
            new.bias = self.bias
        return new.train(self.training)
