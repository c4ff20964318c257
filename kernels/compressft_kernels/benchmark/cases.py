"""One case per operator and shape: operands, the ways to compute it, and the bytes and FLOPs it cannot do without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import compressft_kernels as kernels
from compressft_kernels import dispatch, reference
from compressft_kernels.benchmark import peers
from compressft_kernels.benchmark.peers import Operands as Operands
from compressft_kernels.nf4 import BLOCK, NF4
from compressft_kernels.nf4 import dense as dense_weight

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)

Make = Callable[[torch.device, torch.dtype, int], Operands]


@dataclass(frozen=True)
class Way:
    """One way to compute a case.

    Attributes:
        call: operands -> output.
        leaves: the operands that get gradients; None means the case's.
        prepare: operands -> what this way reads besides; once per copy of the operands, not timed.
        same: computes the same function, so that it counts among the peers; else it is printed as a bound.
        compiles: is compiled first, which takes seconds.
        within: gives what surrounds a call and its gradients.
    """

    call: Callable[[Operands], Tensor]
    leaves: tuple[str, ...] | None = None
    prepare: Callable[[Operands], Operands] | None = None
    same: bool = True
    compiles: bool = False
    within: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Case:
    """An operator at one shape.

    Attributes:
        make: (device, dtype, seed) -> operands, random.
        leaves: the operands that get gradients.
        ours, naive: the public function, and PyTorch's eager composition.
        truth: the plain-torch twin, to be given float64 operands.
        peers: further ways by name.
        library: PyTorch's fused function for it, if there is one: as exact as that is exact enough.
        streams: (elements of x's dtype, other bytes) that each pass must move at least, by pass.
        flops: multiplications and additions of each pass.
        weight: elements of the weight, to count temporaries as large among the saved tensors; 0 if there is none.
        between: changes operands in place before every call, as a step of training does; not timed.
        compile: whether torch.compile is among the peers.
        dtype: what it is timed in; None for the device's default.
    """

    operation: str
    name: str
    make: Make
    leaves: tuple[str, ...]
    ours: Callable[[Operands], Tensor]
    naive: Callable[[Operands], Tensor]
    truth: Callable[[Operands], Tensor]
    streams: Mapping[str, tuple[int, int]]
    flops: Mapping[str, int]
    peers: Mapping[str, Way] = field(default_factory=dict)
    library: Callable[[Operands], Tensor] | None = None
    weight: int = 0
    between: Callable[[Operands], None] | None = None
    compile: bool = True
    dtype: torch.dtype | None = None

    def bytes(self, which: str, element: int) -> int:
        """What a pass must move with elements of x's dtype of so many bytes."""
        elements, others = self.streams[which]
        return elements * element + others


def upcast(operands: Operands) -> Operands:
    """The operands in float64; NF4 and integers as they are."""
    floating = {k for k, v in operands.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {k: v.double() if k in floating else v for k, v in operands.items()}


def _draw(device: torch.device, dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def adapter(
    tokens: tuple[int, ...], width: int, size: int, *, norm: bool = False, activation: str = "gelu", bias: bool = True
) -> Case:
    """x (*tokens, width), a bottleneck of `size`; the residual is x."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Operands:
        normal = _draw(device, dtype, seed)
        o: Operands = {
            "x": normal(*tokens, width),
            "down_weight": normal(size, width, scale=width**-0.5),
            "up_weight": normal(width, size, scale=size**-0.5),
        }
        if bias:
            o |= {"down_bias": normal(size), "up_bias": normal(width)}
        if norm:
            o |= {"gamma": 1 + normal(width, scale=0.1), "beta": normal(width, scale=0.1)}
        return o

    def by(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        def call(o: Operands) -> Tensor:
            down, up = (o["down_weight"], o.get("down_bias")), (o["up_weight"], o.get("up_bias"))
            scaled = (o["gamma"], o["beta"], 1e-5) if norm else None
            return function(o["x"], *down, *up, activation=activation, residual=o["x"], norm=scaled)

        return call

    def naive(o: Operands) -> Tensor:
        x = F.layer_norm(o["x"], (width,), o["gamma"], o["beta"], 1e-5) if norm else o["x"]
        hidden = reference.ACTIVATIONS[activation](F.linear(x, o["down_weight"], o.get("down_bias")))
        return o["x"] + F.linear(hidden, o["up_weight"], o.get("up_bias"))

    rows, matrices = math.prod(tokens), 2 * width * size
    vectors = (width + size if bias else 0) + (2 * width if norm else 0)
    biases, norms = ("down_bias", "up_bias") if bias else (), ("gamma", "beta") if norm else ()
    return Case(
        "adapter",
        f"{_sizes(tokens)} d{width} r{size}{' norm' if norm else ''}",
        make,
        ("x", "down_weight", "up_weight", *biases, *norms),
        by(kernels.adapter),
        naive,
        by(reference.adapter),
        # Forward x, y and the parameters; backward x, dy, dx, the parameters and their gradients.
        {FORWARD: (2 * rows * width + matrices + vectors, 0), BOTH: (5 * rows * width + 3 * (matrices + vectors), 0)},
        {FORWARD: 2 * rows * matrices, BOTH: 6 * rows * matrices},
    )


class _Binarise(torch.autograd.Function):
    """The straight-through estimator as it is written by hand."""

    @staticmethod
    def forward(ctx: object, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: object, dmask: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dmask, None


def masked(
    tokens: tuple[int, ...], out: int, inner: int, *, threshold: float = 0.0, nf4: bool = False, bias: bool = True,
    changed: bool = False,
) -> Case:  # fmt: skip
    """x (*tokens, inner), weight and scores (out, inner); `changed`: the scores change before every call."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Operands:
        normal = _draw(device, dtype, seed)
        weight = normal(out, inner, scale=inner**-0.5)
        o: Operands = {"x": normal(*tokens, inner), "weight": NF4.quantise(weight) if nf4 else weight}
        o |= {"scores": normal(out, inner)}
        return o | {"bias": normal(out)} if bias else o

    def by(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        return lambda o: function(o["x"], o["weight"], o["scores"], threshold=threshold, bias=o.get("bias"))

    def naive(o: Operands) -> Tensor:
        mask = _Binarise.apply(o["scores"], threshold)
        return F.linear(o["x"], dense_weight(o["weight"], o["x"].dtype) * mask, o.get("bias"))

    def flip(o: Operands) -> None:
        with torch.no_grad():
            o["scores"].neg_()

    rows, size = math.prod(tokens), out * inner
    ends, stored = rows * (out + inner), (0, nf4_bytes(size)) if nf4 else (size, 0)
    biases = ("bias",) if bias else ()
    # Peers without a mask say what masking costs: the same product by the library's dense kernels.
    dense = Way(
        lambda o: F.linear(o["x"], o["dense"], o.get("bias")),
        ("x", "dense", *biases),
        lambda o: {"dense": dense_weight(o["weight"], o["x"].dtype).clone()},
        same=False,
    )
    return Case(
        "masked_linear",
        f"{_sizes(tokens)} {out}x{inner}{' NF4' if nf4 else ''}{', scores changed' if changed else ''}",
        make,
        ("x", "scores", *biases),
        by(kernels.masked_linear),
        naive,
        by(reference.masked_linear),
        # Forward x, y, weight, scores; for dx as much again with dy and dx; for the scores x, dy, weight and result.
        {
            FORWARD: (ends + stored[0] + size, stored[1]),
            BOTH: (3 * (ends + stored[0] + size), 3 * stored[1]),
        },
        {FORWARD: 2 * rows * size, BOTH: 6 * rows * size},
        {"dense": dense},
        weight=size,
        between=flip if changed else None,
    )


def nf4_bytes(size: int) -> int:
    """Bytes of an NF4 weight: half a byte an element and a float32 scale a block."""
    return size // 2 + 4 * (-(-size // BLOCK))


def packed(
    tokens: tuple[int, ...], out: int, inner: int, *, mask: bool = True, nf4: bool = False, bias: bool = True,
    density: float = 0.5,
) -> Case:  # fmt: skip
    """x (*tokens, inner), a frozen weight (out, inner), one bit each for its mask."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Operands:
        normal = _draw(device, dtype, seed)
        weight = normal(out, inner, scale=inner**-0.5)
        o: Operands = {"x": normal(*tokens, inner), "weight": NF4.quantise(weight) if nf4 else weight}
        kept = torch.special.ndtr(normal(out, inner).float()) < density
        o |= {"bits": kernels.pack_mask(kept) if mask else None}
        return o | {"bias": normal(out)} if bias else o

    def by(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        return lambda o: function(o["x"], o["weight"], o["bits"], bias=o.get("bias"))

    def effective(o: Operands) -> Tensor:
        weight = dense_weight(o["weight"], o["x"].dtype)
        return weight * kernels.unpack_mask(o["bits"], inner) if mask else weight

    # What the same result costs from a masked weight that is kept in full next to the packed one.
    dense = Way(lambda o: F.linear(o["x"], o["dense"], o.get("bias")), prepare=lambda o: {"dense": effective(o)})
    rows, size = math.prod(tokens), out * inner
    stored, bits = (0, nf4_bytes(size)) if nf4 else (size, 0), out * -(-inner // 8) if mask else 0
    ends = rows * (out + inner)
    return Case(
        "packed_linear",
        f"{_sizes(tokens)} {out}x{inner}{' NF4' if nf4 else ''}{'' if mask else ', no mask'}",
        make,
        ("x", "bias") if bias else ("x",),
        by(kernels.packed_linear),
        lambda o: F.linear(o["x"], effective(o), o.get("bias")),
        by(reference.packed_linear),
        {FORWARD: (ends + stored[0], stored[1] + bits), BOTH: (2 * (ends + stored[0]), 2 * (stored[1] + bits))},
        {FORWARD: 2 * rows * size, BOTH: 4 * rows * size},
        {"dense": dense},
        weight=size,
    )


def block_sparse(
    tokens: tuple[int, ...], out: int, inner: int, tile: tuple[int, int], *, density: float = 0.25, bias: bool = True
) -> Case:
    """x (*tokens, inner), the live tiles of a weight (out, inner); as many as the density says, at random places."""
    grid = (out // tile[0], inner // tile[1])
    live = round(density * grid[0] * grid[1])

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Operands:
        normal = _draw(device, dtype, seed)
        order = torch.randperm(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
        places = order[:live].sort().values.to(device)
        layout = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=device)
        layout[places] = True
        o: Operands = {"x": normal(*tokens, inner), "blocks": normal(live, *tile, scale=inner**-0.5)}
        o |= {"layout": layout.view(grid), "places": places}
        return o | {"bias": normal(out)} if bias else o

    def by(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        return lambda o: function(o["x"], o["blocks"], o["layout"], bias=o.get("bias"))

    def assembled(o: Operands) -> Tensor:
        tiles = o["blocks"].new_zeros(grid[0] * grid[1], *tile).index_copy(0, o["places"], o["blocks"])
        return tiles.view(*grid, *tile).transpose(1, 2).reshape(out, inner)

    biases = ("bias",) if bias else ()
    dense = Way(
        lambda o: F.linear(o["x"], o["dense"], o.get("bias")),
        ("x", "dense", *biases),
        lambda o: {"dense": assembled(o).detach()},
    )
    rows, size = math.prod(tokens), live * tile[0] * tile[1]
    elements = rows * (out + inner) + size
    return Case(
        "block_sparse_linear",
        f"{_sizes(tokens)} {out}x{inner} tile {_sizes(tile) if tile[0] != tile[1] else tile[0]} {density:.0%}",
        make,
        ("x", "blocks", *biases),
        by(kernels.block_sparse_linear),
        lambda o: F.linear(o["x"], assembled(o), o.get("bias")),
        by(reference.block_sparse_linear),
        {FORWARD: (elements, 0), BOTH: (3 * elements, 0)},
        {FORWARD: 2 * rows * size, BOTH: 6 * rows * size},
        {"dense": dense},
        weight=out * inner,
    )


def prefix(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, size: int, *, causal: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Case:  # fmt: skip
    """q (batch, heads, queries, width), k and v (batch, kv_heads, keys, width), a prefix of `size` keys."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Operands:
        normal = _draw(device, dtype, seed)
        o: Operands = {"q": normal(batch, heads, queries, width)}
        o |= {name: normal(batch, kv_heads, keys, width) for name in ("k", "v")}
        o |= {name: normal(kv_heads, size, width) for name in ("prefix_k", "prefix_v")}
        return o | {"lengths": None if lengths is None else torch.tensor(lengths, device=device)}

    def by(function: Callable[..., Tensor]) -> Callable[[Operands], Tensor]:
        names = ("q", "k", "v", "prefix_k", "prefix_v")
        return lambda o: function(*(o[name] for name in names), causal=causal, lengths=o["lengths"])

    pairs = queries * size + queries * keys - (queries * (queries - 1) // 2 if causal else 0)
    elements = 2 * batch * width * (heads * queries + kv_heads * keys) + 2 * kv_heads * size * width
    products = 2 * batch * heads * width * pairs
    return Case(
        "prefix_attention",
        f"B{batch} H{heads}{'' if heads == kv_heads else f'/{kv_heads}'} T{queries} S{keys} D{width} P{size}"
        f"{' causal' if causal else ''}{'' if lengths is None else ' padded'}",
        make,
        ("q", "k", "v", "prefix_k", "prefix_v") if size else ("q", "k", "v"),
        by(kernels.prefix_attention),
        lambda o: peers.eager_attention(o, causal),
        by(reference.prefix_attention),
        # Backward reads q, k, v, o and do and writes dq, dk, dv: twice the forward's. Two products forward, five back.
        {FORWARD: (elements, 0), BOTH: (3 * elements, 0)},
        {FORWARD: 2 * products, BOTH: 7 * products},
        {
            name: Way(call, prepare=prepare, compiles=name == "FlexAttention")
            for name, (call, prepare) in peers.attention(causal).items()
            if lengths is None and size and (not causal or queries in (1, keys))
        },
        library=lambda o: peers.library_attention(o, causal),
    )


def quicker(case: Case) -> Case:
    """The case without torch.compile among its peers."""
    return replace(case, compile=False)


def in_float32(case: Case) -> Case:
    """The case in float32, as `dispatch` has it and with the kernel that it may have left out next to it."""
    kernel = Way(case.ours, within=dispatch.kernels_for_float32)
    return replace(case, name=f"{case.name} float32", dtype=torch.float32, peers={"kernel": kernel}, compile=False)
