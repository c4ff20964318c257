"""Every shipped configuration, launched as in real use on tensors without memory: what test_ahead.py compiles.

One case per row of the table and whatever else changes the machine code; shapes are those of real models.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
from compressft_kernels import dispatch
from compressft_kernels.ops import block_sparse, linear, prefix
from compressft_kernels.ops import bottleneck as adapters_op
from compressft_kernels.reference import bottleneck

HALF, SINGLE = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tables(size: int, double: bool) -> list[torch.Tensor | None]:
    """NF4's tables for a weight of so many elements."""
    blocks = size // 64
    if not double:
        return [meta(blocks, dtype=SINGLE), meta(16, dtype=SINGLE), None, None, None]
    second = [meta(blocks // 256, dtype=SINGLE), meta(256, dtype=SINGLE), meta(dtype=SINGLE)]
    return [meta(blocks, dtype=torch.uint8), meta(16, dtype=SINGLE), *second]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """float32 products by tensor cores, or exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def linears() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Row counts on both sides of every `rows_max`, all weights and masks, forward and backward."""
    kinds = {"bfloat16": HALF, "float16": torch.float16, "tf32": SINGLE, "float32": SINGLE}
    weights = ("same", "float32", "nf4", "nf4 double")
    masks = {"scores": SINGLE, "half scores": HALF, "bits": torch.uint8, "no mask": None}
    for (kind, dtype), weight, mask, rows in product(kinds.items(), weights, masks, (16, 64, 255, 8192)):
        if weight == "float32" and dtype == SINGLE:
            continue
        name = f"{kind} {rows} rows, {weight} weight, {mask}"
        yield f"linear {name}", partial(run_linear, kind, dtype, weight, masks[mask], rows, False)
        yield f"linear backward {name}", partial(run_linear, kind, dtype, weight, masks[mask], rows, True)


def run_linear(kind: str, dtype: torch.dtype, weight: str, mask: torch.dtype | None, rows: int, backward: bool) -> None:
    size = [4096, 1024]
    stored, extra = meta(*size, dtype=SINGLE if weight == "float32" else dtype), [None] * 5
    if weight.startswith("nf4"):
        stored, extra = meta(4096 * 512, dtype=torch.uint8), tables(4096 * 1024, weight == "nf4 double")
    gate = None if mask is None else meta(4096, 128 if mask == torch.uint8 else 1024, dtype=mask)
    x, dy = meta(rows, 1024, dtype=dtype), meta(rows, 4096, dtype=dtype)
    with tf32(kind == "tf32"), dispatch.kernels_for_float32():
        if not backward:
            linear.forward(x, meta(4096, dtype=dtype), stored, gate, 0.5, size, *extra)
            return
        scored = mask is not None and mask.is_floating_point
        wanted = [True, not scored and not weight.startswith("nf4"), scored]
        linear.backward(dy, x if wanted[1] or wanted[2] else None, wanted, stored, gate, 0.5, size, *extra)


def adapters() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Widths and bottlenecks of small and large models, every activation, with and without norm and residual."""
    kinds = {"bfloat16": HALF, "float16": torch.float16, "tf32": SINGLE, "float32": SINGLE}
    extras = ("alone", "norm", "residual", "norm, on its input")
    activations = cycle(bottleneck.ACTIVATIONS)
    grid = product(kinds, (768, 384, 4096), (16, 64, 128, 256), extras, (16, 255, 32768))
    for (kind, width, size, extra, rows), activation in zip(grid, activations, strict=False):
        name = f"{kind} {rows} rows, {width} wide, {size} units, {activation}, {extra}"
        arguments = (kind, kinds[kind], width, size, extra, activation, rows)
        yield f"adapter {name}", partial(run_adapter, *arguments, False)
        yield f"adapter backward {name}", partial(run_adapter, *arguments, True)


def run_adapter(
    kind: str, dtype: torch.dtype, width: int, size: int, extra: str, activation: str, rows: int, backward: bool
) -> None:
    def of(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=dtype)

    weights = (of(size, width), of(size), of(width, size), of(width))
    norm = (of(width), of(width)) if "norm" in extra else (None, None)
    settings = (*weights, *norm, activation, 0.5, "on its input" in extra, 1e-5)
    x = of(rows, width)
    with tf32(kind == "tf32"):
        if not backward:
            adapters_op.forward(x, of(rows, width) if extra == "residual" else None, True, *settings)
            return
        statistics = [meta(rows, dtype=SINGLE) if norm[0] is not None else None for _ in range(2)]
        mean, rstd = (meta(0, dtype=SINGLE) if t is None else t for t in statistics)
        adapters_op.backward(of(rows, width), x, of(rows, size), mean, rstd, [True] * 7, *settings)


def prefixes() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Head widths from 16 to 256, plain and grouped heads, training and decoding, every mask."""
    kinds = {"bfloat16": HALF, "float16": torch.float16, "tf32": SINGLE, "float32": SINGLE}
    masks = ("all keys", "causal", "padded", "causal and padded")
    grid = product(kinds, (64, 128, 16, 32, 80, 256), ((12, 12), (32, 8)), masks, ((1024, 1024), (1, 4096), (17, 130)))
    for kind, width, heads, mask, length in grid:
        name = f"{kind} {length[0]} queries, {length[1]} keys, {heads[0]} heads on {heads[1]}, {width} wide, {mask}"
        yield f"prefix {name}", partial(run_prefix, kind, kinds[kind], width, heads, mask, length, False)
        yield f"prefix backward {name}", partial(run_prefix, kind, kinds[kind], width, heads, mask, length, True)


def run_prefix(
    kind: str, dtype: torch.dtype, width: int, heads: tuple[int, int], mask: str, length: tuple[int, int],
    backward: bool,
) -> None:  # fmt: skip
    # As transformers lays them out: heads between tokens and width.
    q = meta(8, length[0], heads[0], width, dtype=dtype).transpose(1, 2)
    k, v = (meta(8, length[1], heads[1], width, dtype=dtype).transpose(1, 2) for _ in range(2))
    pk, pv = (meta(heads[1], 64, width, dtype=dtype) for _ in range(2))
    lengths = meta(8, dtype=torch.int64) if "padded" in mask else None
    settings = (q, k, v, pk, pv, lengths, "causal" in mask, width**-0.5)
    with tf32(kind == "tf32"):
        if backward:
            prefix.backward(q, q, meta(8, heads[0], length[0], dtype=SINGLE), [True] * 5, *settings)
        else:
            prefix.forward(*settings)


def sparse() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Tiles from 16 to 128, a quarter of them live."""
    kinds = {"bfloat16": HALF, "float16": torch.float16, "tf32": SINGLE, "float32": SINGLE}
    for kind, tile, rows in product(
        kinds, ((64, 64), (128, 128), (32, 32), (16, 16), (32, 64), (128, 32)), (16, 255, 8192)
    ):
        name = f"{kind} {rows} rows, tiles of {min(tile)} by {max(tile)}, {'wide' if tile[1] > tile[0] else 'high'}"
        yield f"sparse {name}", partial(run_sparse, kind, kinds[kind], tile, rows, False)
        yield f"sparse backward {name}", partial(run_sparse, kind, kinds[kind], tile, rows, True)


def run_sparse(kind: str, dtype: torch.dtype, tile: tuple[int, int], rows: int, backward: bool) -> None:
    layout = meta(3072 // tile[0], 768 // tile[1], dtype=torch.bool)
    blocks = meta(layout.numel() // 4, *tile, dtype=dtype)
    x, dy = meta(rows, 768, dtype=dtype), meta(rows, 3072, dtype=dtype)
    with tf32(kind == "tf32"):
        if backward:
            block_sparse.backward(dy, x, [True, True], blocks, layout)
        else:
            block_sparse.forward(x, meta(3072, dtype=dtype), blocks, layout)


FAMILIES = (linears, adapters, prefixes, sparse)
# What no row of the table tells apart and yet is compiled differently: loads of packed bytes, and the norm.
ALWAYS = {
    "linear bfloat16 16 rows, nf4 weight, bits",
    "linear backward bfloat16 255 rows, nf4 double weight, no mask",
    "linear bfloat16 255 rows, same weight, bits",
    "linear backward bfloat16 16 rows, same weight, bits",
    "adapter bfloat16 255 rows, 768 wide, 64 units, gelu_tanh, norm",
    "adapter backward bfloat16 255 rows, 768 wide, 64 units, gelu_tanh, norm",
}


def everything() -> Iterator[tuple[str, Callable[[], Any]]]:
    for family in FAMILIES:
        yield from family()


def rows_of(entry: str) -> list[tuple[str, dict[str, Any]]]:
    """Kernel and row of all of an entry's settings."""
    return [(name, row) for name, rows in dispatch.TABLE[entry].items() if name != "limits" for row in rows]


def rows_alike(entry: str, other: str) -> set[int]:
    """Identities of the configurations of an entry whose rows another has too."""
    there = rows_of(other)
    return {id(row["config"]) for name, row in rows_of(entry) if (name, row) in there}


def entry_of(target: str) -> str:
    """The table's entry for a device such as "sm_86"."""
    return dispatch.table_of(divmod(int(target.removeprefix("sm_")), 10))


def compiled_elsewhere(target: str) -> set[int]:
    """What sm_89 has in common with sm_80 is compiled there."""
    return rows_alike(target, "sm_80") if target == "sm_89" else set()


def chosen(target: str, share: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One case of every `share` by the hash of its name, `ALWAYS`, and the first to use each row of the table."""
    from compressft_kernels.launch_triton import intercepting

    seen, entry = compiled_elsewhere(target), entry_of(target)
    for name, run in everything():
        with rows_used(entry) as used, intercepting(lambda *_: None):
            run()
        if used - seen or name in ALWAYS or zlib.crc32(name.encode()) % share == 0:
            seen |= used
            yield name, run


@contextmanager
def rows_used(entry: str) -> Iterator[set[int]]:
    """Collects the identities of the table's configurations that choices inside fall on."""
    used: set[int] = set()
    choose = dispatch.configuration

    def watched(*args: Any, **facts: Any) -> dict[str, int]:
        config = choose(*args, **facts)
        used.add(id(config))
        return config

    dispatch.configuration = watched
    try:
        with dispatch.pretending(entry):
            yield used
    finally:
        dispatch.configuration = choose


def compile_all(target: str, share: int, some: int | None = None, draw: str = "") -> dict[str, Any]:
    """The gates' facts of every chosen case, and the rows of the table that no case uses.

    Args:
        target: a device, such as "sm_86", that takes its settings from an entry of the table.
        some: compile so many cases, drawn by the hash of `draw` and their names; of the others see what they use.
    """
    from compressft_kernels import ahead_triton
    from compressft_kernels.launch_triton import intercepting

    capability, entry = int(target.removeprefix("sm_")), entry_of(target)
    kernels, used_at_all = [], compiled_elsewhere(target)
    common = rows_alike(entry, "sm_89") if target == "sm_80" else set()
    cases = list(chosen(target, share))
    assert {name for name, _ in cases} >= ALWAYS
    drawn = sorted((name for name, _ in cases), key=lambda name: zlib.crc32(f"{draw} {name}".encode()))[:some]
    for name, run in cases:
        if name not in drawn:
            with rows_used(entry) as used, intercepting(lambda *_: None):
                run()
            used_at_all |= used
            continue
        with rows_used(entry) as used, ahead_triton.compiling(capability) as compiled:
            run()
        used_at_all |= used
        for kernel, code in compiled:
            facts = ahead_triton.facts(code)
            kernels.append(
                {
                    "case": name,
                    "kernel": kernel,
                    # Registers are as many there, shared memory is less.
                    "faults": facts.faults(capability) + (facts.faults(89) if used <= common else []),
                    "dots": "tt.dot" in code.asm["ttir"],
                    "hgmma": facts.hgmma,
                    "utcmma": facts.utcmma,
                    "hmma": facts.hmma,
                    "wide": facts.wide_loads,
                    "narrow": facts.narrow_loads,
                    "loads": [loop.loads for loop in facts.loops],
                }
            )
    unused = [(kernel, row["when"]) for kernel, row in rows_of(entry) if id(row["config"]) not in used_at_all]
    return {"kernels": kernels, "unused": unused}
