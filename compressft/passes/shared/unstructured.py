"""What the passes share that gate single weights of the transformer layers' linear projections.

Embeddings, pooler and head have no gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.surgery import compress_linear
from compressft.modules.gate import Gate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.passes.shared.select import check_exclude, layer_linears
from compressft.transform import Claim, Resource

# What all of them take: of two, neither would keep its sparsity.
SINGLE = Claim(Resource.SINGLE_WEIGHTS, "removes single weights", fix="give each a stage of its own")
# What those take besides that learn which weights go.
LEARNED = Claim(Resource.SCORES, "learns which weights to leave out", fix="prune in an earlier stage")

# (path, layer) -> a new gate for it, everything alive.
NewGate = Callable[[str, CompressedLinear], Gate]


class Excludes(Protocol):
    """A pass with parts that stay dense.

    Field `exclude`: "q", "k", "v", "o", "up", "down", or a module's full path; a fused qkv projection stays dense
    where any of its three does.
    """

    @property
    def type(self) -> str: ...

    @property
    def exclude(self) -> tuple[str, ...]: ...


def chosen(model: nn.Module, one: Excludes) -> list[str]:
    """Paths of the projections that a pass may gate, in execution order.

    Raises:
        UserError: `exclude` names something that is not there, or leaves nothing.
    """
    check_exclude(model, f"pass {one.type}.exclude", one.exclude)
    paths = layer_linears(model, one.exclude)
    if not paths:
        raise nothing_left(one)
    return paths


def nothing_left(one: Excludes) -> UserError:
    """What a pass says that has nothing to prune."""
    return UserError(f"pass {one.type}.exclude: {list(one.exclude)} leaves nothing to prune; exclude less")


def add_gate(model: nn.Module, name: str, path: str, new: NewGate) -> None:
    """Put a gate of this name on one projection."""
    linear = compress_linear(model, path)
    linear.gates[name] = new(path, linear).to(linear.weight.device)


def gate_all(model: nn.Module, one: Excludes, new: NewGate) -> None:
    """Put a pass's gate on every projection that it does not exclude.

    Raises:
        UserError: as `chosen`.
    """
    for path in chosen(model, one):
        add_gate(model, one.type, path, new)


def fold_gates(model: nn.Module, name: str) -> None:
    """Settle all gates of this name: what they close is zero from here on."""
    for linear, _ in gates_of(model, name, Gate):
        linear.fold(name)


def sparsity_now(model: nn.Module, name: str) -> float:
    """Fraction of the weights under gates of this name that is gone."""
    return removed([gate for _, gate in gates_of(model, name, Gate)])


def removed(gates: Sequence[Gate]) -> float:
    """Fraction of what these gates decide on that is gone."""
    masks = [gate.mask for gate in gates]
    return 1.0 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def present(linear: CompressedLinear) -> Tensor:
    """W + delta, (out, in), without a graph: what the gates act on."""
    weight = linear.weight if linear.delta is None else linear.weight + linear.delta()
    return weight.detach()
