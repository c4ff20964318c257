"""CompressedLinear: everything that can happen to one weight meets here, in slots, not in nested wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, TypeVar

import torch
from compressft_kernels import packed_linear
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.current import Current
from compressft.modules.dtypes import like
from compressft.modules.gate import Gate, Gates, MaskGate, ScoreGate
from compressft.modules.kinds import known
from compressft.modules.quantizer import Quantizer
from compressft.modules.store import NF4Store
from compressft.utils.texts import JSON

Kind = TypeVar("Kind", bound=Gate)

_dense = Current(False)
_bare = Current(False)


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


@contextmanager
def bare() -> Iterator[None]:
    """Inside, deltas and adapters are off too: the model acts as the base that it started from (the `base` teacher)."""
    token = _bare.set(True)
    try:
        with dense():
            yield
    finally:
        _bare.reset(token)


def is_bare() -> bool:
    """Whether `bare()` is in force."""
    return _bare.get()


@known
class CompressedLinear(nn.Linear):
    """y = adapter(x W_eff^T + b) with W_eff = quantise(gates * (W + delta)).

    Slots: `gates` (by the type of the pass that put them there), `delta` (a module whose forward returns an (out, in)
    tensor; it may have `product(x)`, a cheaper way to the same output, and `bias()`, the bias with its change),
    `quantizer` (multiplies in the deployed arithmetic), `adapter` (a module on the output), `store` (holds a frozen
    weight in place of the parameter); the last four are None when empty. The parameters keep the names `weight`
    (out, in) and `bias` (out,) of the layer they came from; a stored weight is built again, fp32, whenever `weight` is
    read. `transposed` remembers that it was a Conv1D, whose weight is stored (in, out).
    """

    kind: ClassVar[str] = "linear"
    gates: Gates
    delta: nn.Module | None
    quantizer: Quantizer | None
    adapter: nn.Module | None
    store: NF4Store | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, transposed: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.transposed = transposed
        self.gates = Gates()
        self.delta = None
        self.quantizer = None
        self.adapter = None
        self.store = None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name == "weight" and self._modules.get("store") is not None:
            return self._modules["store"]()  # type: ignore[misc]
        return super().__getattr__(name)

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

    def describe(self) -> dict[str, JSON]:
        """Nothing: what is in its slots speaks for itself."""
        return {}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> CompressedLinear:
        """In place of the plain layer; the slots follow."""
        assert old is not None
        return cls.of(old)

    def pack(self, store: NF4Store) -> None:
        """Hold the weight in `store` from now on; the parameter is gone."""
        self.store = store
        del self._parameters["weight"]

    def unpack(self) -> None:
        """Make a stored weight a parameter again, frozen, with the values that training used."""
        if self.store is not None:
            weight = self.weight
            self.store = None
            self.weight = nn.Parameter(weight, requires_grad=False)

    def effective_weight(self) -> Tensor:
        """gates * (W + delta), (out, in), before quantisation."""
        weight = self.weight
        if self.delta is not None and not is_bare():
            weight = weight + self.delta()
        return weight if is_dense() else self.gates(weight)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self._product(input)
        return y if self.adapter is None or is_bare() else self.adapter(y)

    def base_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times W alone, (..., out): no gate, no delta, no quantizer."""
        if self.store is not None:
            return packed_linear(x, self.store.nf4, None, bias=bias)
        return F.linear(x, self.weight, bias)

    def effective_bias(self) -> Tensor | None:
        """What is added to the product, (out,): a delta may change it too."""
        changes = None if is_bare() else getattr(self.delta, "bias", None)
        return self.bias if changes is None else changes()

    def _product(self, x: Tensor) -> Tensor:
        quantizer = None if is_dense() else self.quantizer
        gates = [] if is_dense() else list(self.gates.values())
        if quantizer is not None:
            columns = self.gates.columns()
            if self.training:
                quantizer.observe(x, columns)
            if quantizer.ready:
                return quantizer.linear(x, self.effective_weight(), self.effective_bias(), columns)
        if self.delta is None or is_bare():
            if not gates:
                return self.base_product(x, self.bias)
            if len(gates) == 1:
                packed = self.store is not None and _reads_nf4(gates[0])
                return gates[0].linear(x, self.store.nf4 if packed else self.weight, self.bias)  # type: ignore[union-attr]
        else:
            product = getattr(self.delta, "product", None)
            if not gates and product is not None:
                # Cheaper than building W + delta: no gradient of the whole weight.
                return product(x)
        return F.linear(x, *like(x, self.effective_weight(), self.effective_bias()))

    @torch.no_grad()
    def fold(self, *names: str) -> None:
        """Settle the delta and these gates (all if none is named) into the weight's values; a stored weight unpacks.

        `shrink` removes the dead rows and columns; the other gates keep working.
        """
        self.unpack()
        if self.delta is not None:
            weight, bias = self.weight + self.delta(), self.effective_bias()
            self.delta = None
            # In the model's own precision, which may be bf16.
            self.weight.data = weight.to(self.weight.dtype)
            if bias is not self.bias and bias is not None:
                bias = bias.to(self.weight.dtype, copy=True)
                self.bias = nn.Parameter(bias, requires_grad=self.weight.requires_grad)
        for name in names or list(self.gates):
            self.weight.data = self.gates[name](self.weight).to(self.weight.dtype)
            del self.gates[name]

    def restore(self) -> nn.Module:
        """The plain layer this came from: nn.Linear, or Conv1D with its transposed weight.

        Raises:
            ValueError: a slot that a plain layer cannot hold is still filled.
        """
        filled = ["gates"] if len(self.gates) else []
        filled += [slot for slot in ("delta", "quantizer", "adapter", "store") if getattr(self, slot) is not None]
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


def _reads_nf4(gate: nn.Module) -> bool:
    """Whether a gate's own product takes NF4 codes as they are."""
    return isinstance(gate, MaskGate) or (isinstance(gate, ScoreGate) and gate.tile == (1, 1))


def gate_of(module: nn.Module, name: str, kind: type[Kind]) -> Kind | None:
    """The gate of this kind that a pass of this name has put into a layer; None where it has none."""
    gate = module.gates[name] if isinstance(module, CompressedLinear) and name in module.gates else None
    return gate if isinstance(gate, kind) else None


def gates_of(model: nn.Module, name: str, kind: type[Kind]) -> list[tuple[CompressedLinear, Kind]]:
    """(layer, gate) for every gate of this kind that a pass of this name has put in, in the model's order."""
    linears = (module for module in model.modules() if isinstance(module, CompressedLinear))
    return [(linear, gate) for linear in linears if (gate := gate_of(linear, name, kind)) is not None]
