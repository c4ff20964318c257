"""CompressedLinear: everything that can happen to one weight meets here, in slots, not in nested wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.gate import Gates
from compressft.modules.quantizer import Quantizer

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
    """y = adapter(x W_eff^T + b) with W_eff = quantise(gates * (W + delta)).

    Slots: `gates` (by the type of the pass that put them there), `delta` (a module whose forward returns an (out, in)
    tensor), `quantizer` (multiplies in the deployed arithmetic), `adapter` (a module on the output); the last three
    are None when empty. The parameters keep the names `weight` (out, in) and `bias` (out,) of the layer they came
    from. `transposed` remembers that it was a Conv1D, whose weight is stored (in, out).
    """

    gates: Gates
    delta: nn.Module | None
    quantizer: Quantizer | None
    adapter: nn.Module | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, transposed: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.transposed = transposed
        self.gates = Gates()
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
        """gates * (W + delta), (out, in), before quantisation."""
        weight = self.weight
        if self.delta is not None:
            weight = weight + self.delta()
        return weight if is_dense() else self.gates(weight)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self._product(input)
        return y if self.adapter is None else self.adapter(y)

    def _product(self, x: Tensor) -> Tensor:
        quantizer = None if is_dense() else self.quantizer
        if quantizer is not None:
            columns = self.gates.columns()
            if self.training:
                quantizer.observe(x, columns)
            if quantizer.ready:
                return quantizer.linear(x, self.effective_weight(), self.bias, columns)
        elif len(self.gates) == 1 and self.delta is None and not is_dense():
            (gate,) = self.gates.values()
            return gate.linear(x, self.weight, self.bias)  # type: ignore[operator]
        return F.linear(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def fold(self, *names: str) -> None:
        """Settle the delta and these gates (all if none is named) into the weight's values.

        `shrink` removes the dead rows and columns; the other gates keep working.
        """
        if self.delta is not None:
            self.weight.data = self.weight + self.delta()
            self.delta = None
        for name in names or list(self.gates):
            self.weight.data = self.gates[name](self.weight)
            del self.gates[name]

    def restore(self) -> nn.Module:
        """The plain layer this came from: nn.Linear, or Conv1D with its transposed weight.

        Raises:
            ValueError: a slot that a plain layer cannot hold is still filled.
        """
        filled = ["gates"] if len(self.gates) else []
        filled += [slot for slot in ("delta", "quantizer", "adapter") if getattr(self, slot) is not None]
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
