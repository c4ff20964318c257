"""Which shapes are checked and which are timed."""

from __future__ import annotations

from compressft_kernels.benchmark.cases import Case, adapter, block_sparse, in_float32, masked, packed, prefix, quicker

INFINITY = float("inf")


def checks() -> list[Case]:
    """For correctness: odd sizes, nothing at all, everything masked, padding, and rows for every block size."""
    return [
        adapter((3, 5), 64, 16),
        adapter((17,), 130, 17, norm=True),
        adapter((0,), 64, 16),
        adapter((33,), 96, 32, activation="relu", bias=False),
        adapter((33,), 96, 32, activation="silu"),
        adapter((33,), 96, 32, activation="tanh"),
        adapter((33,), 96, 32, activation="gelu_tanh", norm=True),
        adapter((130,), 256, 256),
        adapter((9,), 2048, 64, norm=True),
        adapter((600,), 384, 64),
        masked((3, 5), 130, 70),
        masked((1,), 64, 64, bias=False),
        masked((0,), 64, 64),
        masked((17,), 65, 130, threshold=INFINITY),
        masked((17,), 65, 130, threshold=-INFINITY),
        masked((40,), 128, 192, nf4=True),
        masked((300,), 256, 320, threshold=0.25),
        masked((700,), 384, 256),
        packed((3, 5), 130, 70),
        packed((1,), 64, 64, bias=False),
        packed((0,), 64, 64),
        packed((17,), 65, 130, density=0.0),
        packed((17,), 66, 131, nf4=True),
        packed((17,), 130, 71, mask=False),
        packed((1,), 256, 192, mask=False, nf4=True),
        packed((40,), 128, 192, nf4=True),
        packed((300,), 256, 320),
        packed((700,), 384, 256, mask=False, nf4=True),
        block_sparse((3, 5), 48, 80, (16, 16), density=0.5),
        block_sparse((17,), 128, 192, (32, 32)),
        block_sparse((17,), 128, 192, (64, 32)),
        block_sparse((70,), 256, 384, (64, 64)),
        block_sparse((300,), 384, 256, (128, 128), density=0.5),
        block_sparse((0,), 64, 64, (32, 32)),
        block_sparse((17,), 64, 64, (32, 32), density=0.0),
        block_sparse((17,), 64, 64, (32, 32), density=1.0),
        block_sparse((17,), 40, 24, (20, 12), density=0.5),
        prefix(2, 3, 3, 17, 17, 64, 5),
        prefix(2, 4, 2, 17, 33, 40, 7, causal=True),
        prefix(2, 4, 1, 1, 70, 64, 16, causal=True),
        prefix(3, 4, 4, 20, 20, 64, 9, lengths=(0, 7, 20)),
        prefix(3, 2, 2, 20, 20, 32, 9, causal=True, lengths=(0, 7, 20)),
        prefix(3, 2, 2, 20, 20, 32, 0, lengths=(0, 7, 20)),
        prefix(2, 2, 2, 33, 33, 64, 0, causal=True),
        prefix(2, 2, 2, 33, 40, 64, 0),
        prefix(0, 2, 2, 8, 8, 32, 4),
        prefix(2, 4, 2, 260, 260, 128, 70, causal=True),
        prefix(1, 2, 2, 260, 260, 64, 130),
    ]


def quick() -> list[Case]:
    """One small case of every operator, for both devices, to see that the command works."""
    cases = [
        adapter((2, 32), 96, 16),
        masked((64,), 96, 128),
        masked((64,), 96, 128, changed=True),
        packed((64,), 96, 128),
        packed((64,), 96, 128, mask=False, nf4=True),
        block_sparse((64,), 96, 128, (32, 32)),
        prefix(2, 4, 4, 32, 32, 32, 8),
        prefix(2, 4, 2, 32, 32, 32, 8, causal=True),
    ]
    return [quicker(case) for case in cases]


def cpu() -> list[Case]:
    """BERT-base: 768 wide, 12 heads of 64, 1024 tokens."""
    tokens = (8, 128)
    cases = [adapter(tokens, 768, 64), adapter(tokens, 768, 64, norm=True)]
    for out in (768, 3072):
        cases += [masked(tokens, out, 768), masked(tokens, out, 768, changed=True)]
        cases += [packed(tokens, out, 768), packed(tokens, out, 768, mask=False, nf4=True)]
    cases += [block_sparse(tokens, 768, 3072, (size, size)) for size in (32, 64)]
    cases += [prefix(batch, 12, 12, 128, 128, 64, 16) for batch in (8, 1)]
    return [*cases, prefix(8, 12, 4, 128, 128, 64, 16, causal=True)]


# Width of (BERT-base, MiniLM, a 1B model, a 7B model) and of its feed-forward layer.
WIDTHS = ((768, 3072), (384, 1536), (2048, 8192), (4096, 11008))
TOKENS = (1, 16, 256, 4096, 32768)


# Those for torch.compile with all its tuning, some ten seconds a pass.
COMPILED = {
    ("adapter", "4096 d768 r64"),
    ("adapter", "32768 d4096 r64"),
    ("masked_linear", "4096 4096x4096"),
    ("packed_linear", "16 4096x4096"),
    ("packed_linear", "16 4096x4096 NF4, no mask"),
    ("block_sparse_linear", "4096 4096x4096 tile 128 25%"),
    ("prefix_attention", "B16 H32 T1024 S1024 D128 P128 causal"),
}


def cuda() -> list[Case]:
    """BERT-base, MiniLM, 1B and 7B: one token to 32,768."""
    cases = []
    for width, _ in WIDTHS:
        cases += [adapter((tokens,), width, 64) for tokens in TOKENS]
    cases += [adapter((4096,), 768, 16), adapter((4096,), 768, 256), adapter((4096,), 768, 64, norm=True)]
    cases += [adapter((32768,), 4096, 16), adapter((32768,), 4096, 256), adapter((32768,), 4096, 64, norm=True)]
    for width, inner in WIDTHS:
        for tokens in TOKENS:
            out = inner if width == 768 else width
            cases += [masked((tokens,), out, width), packed((tokens,), out, width)]
            if tokens <= 4096:
                cases += [packed((tokens,), out, width, mask=False, nf4=True)]
    for tokens in (16, 256, 4096, 32768):
        cases += [block_sparse((tokens,), 768, 3072, (size, size)) for size in (32, 64)]
        cases += [block_sparse((tokens,), 4096, 4096, (size, size)) for size in (64, 128)]
    cases += [block_sparse((4096,), 4096, 4096, (128, 128), density=density) for density in (0.1, 0.5, 0.9)]
    cases += [
        prefix(32, 12, 12, 128, 128, 64, 16),
        prefix(8, 12, 12, 512, 512, 64, 64),
        prefix(32, 12, 12, 128, 128, 32, 16),
        prefix(4, 32, 8, 2048, 2048, 64, 128, causal=True),
        prefix(16, 32, 32, 1024, 1024, 128, 128, causal=True),
        prefix(4, 32, 32, 4096, 4096, 128, 128),
        prefix(4, 32, 8, 4096, 4096, 128, 128, causal=True),
        prefix(1, 32, 8, 8192, 8192, 128, 512, causal=True),
        prefix(16, 32, 8, 1, 4096, 128, 512, causal=True),
    ]
    # Does the kernel win without tensor cores? What the table says then is the tuner's.
    exact = [
        case((tokens,), *sizes) for tokens in (16, 4096) for case, *sizes in ((adapter, 768, 64), (masked, 768, 768))
    ]
    exact += [prefix(batch, 12, 12, 128, 128, 64, 16) for batch in (1, 32)]
    cases = [case if (case.operation, case.name) in COMPILED else quicker(case) for case in cases]
    return [*cases, *(in_float32(case) for case in exact)]
