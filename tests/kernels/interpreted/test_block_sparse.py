"""The block-sparse kernels against their twin in float64: which tiles are read, every tail, strides and dtypes."""

import pytest
import torch
from compressft_kernels.block_sparse_triton import Index, backward_blocks, backward_x, forward, index
from compressft_kernels.reference import block_sparse_linear

DTYPES = [torch.float64, torch.float32, torch.float16]


def product(block_t, block_r, tokens_left):
    return {"BLOCK_T": block_t, "BLOCK_R": block_r, "TOKENS_LEFT": tokens_left, "num_warps": 4, "num_stages": 3}


def weights(block_t, tiles, tiles_left, split):
    warps = {"num_warps": 4, "num_stages": 3}
    return {"BLOCK_T": block_t, "TILES": tiles, "TILES_LEFT": tiles_left, "SPLIT": split, **warps}


SMALL = (product(16, 16, 0), weights(16, 2, 0, 2))
LEFT = (product(16, 16, 1), weights(16, 2, 1, 1))


def some(random, lines, columns, density):
    """A random layout with exactly this share of live tiles."""
    return random(lines, columns).flatten().argsort().view(lines, columns) < round(density * lines * columns)


def check(close, poison, x, blocks, layout, dy, bias, configs=SMALL):
    """Outputs and all gradients against the twin on the same operands in float64."""
    operands = [t.double().requires_grad_() for t in (x, blocks)]
    want = block_sparse_linear(*operands, layout)
    want_dx, want_dblocks = torch.autograd.grad(want, operands, dy.double())
    want = want.detach() if bias is None else want.detach() + bias.double()
    x, blocks, dy, bias = (poison(t) for t in (x, blocks, dy, bias))
    found = Index(*(poison(t) for t in index(layout, len(blocks))))
    size = tuple(layout.shape)
    close(forward(x, blocks, found, size, bias, configs[0]), want, x.dtype)
    close(backward_x(dy, blocks, found, size, configs[0]), want_dx, dy.dtype)
    close(backward_blocks(dy, x, blocks, found, size, configs[1]), want_dblocks, blocks.dtype)


def draw(random, rows, layout, bo, bi, dtype):
    """x, blocks, layout, dy, bias."""
    n = int(layout.ne(0).sum())
    lines, columns = layout.shape
    x, dy = random(rows, columns * bi, dtype=dtype), random(rows, lines * bo, dtype=dtype)
    return x, random(n, bo, bi, dtype=dtype), layout, dy, random(lines * bo, dtype=dtype)


LAYOUTS = [
    torch.tensor([[True, False, True], [False, False, False], [True, True, True]]),
    torch.tensor([[0, -1, 0], [2, 0, 7]]).t(),  # integer, not contiguous
    torch.zeros(2, 3, dtype=torch.bool),
    torch.ones(2, 3, dtype=torch.uint8),
    torch.eye(3, 5, dtype=torch.int64),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index(layout):
    live = [(r, c) for r in range(layout.shape[0]) for c in range(layout.shape[1]) if layout[r, c]]
    found = index(layout, len(live))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in found)
    lines = [
        (r, found.column[place].item(), place)
        for r in range(layout.shape[0])
        for place in range(found.row_start[r], found.row_start[r + 1])
    ]
    assert lines == [(r, c, place) for place, (r, c) in enumerate(live)]
    columns = [
        (c, found.row[i].item(), found.place[i].item())
        for c in range(layout.shape[1])
        for i in range(found.column_start[c], found.column_start[c + 1])
    ]
    assert columns == sorted((c, r, place) for place, (r, c) in enumerate(live))
    assert [t.shape for t in index(layout.to("meta"), len(live))] == [t.shape for t in found]


@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_index_of_another_number_of_live_tiles_stays_in_bounds(n):
    found = index(LAYOUTS[1], n)
    assert found.row_start.max() <= n and found.column_start.max() <= n
    assert sorted(found.place.tolist()) == list(range(n))
    assert found.row.lt(3).all() and found.column.lt(2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("configs", [SMALL, LEFT])
@pytest.mark.parametrize(("rows", "bo", "bi"), [(1, 16, 16), (17, 16, 32), (65, 64, 16)])
def test_equals_the_twin(random, close, poison, rows, bo, bi, configs, dtype):
    check(close, poison, *draw(random, rows, some(random, 3, 5, 0.4), bo, bi, dtype), configs)


@pytest.mark.parametrize("configs", [SMALL, LEFT])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [0, 17])
def test_layouts_with_dead_rows_and_columns(random, close, poison, rows, layout, configs):
    check(close, poison, *draw(random, rows, layout, 16, 16, torch.float32), configs)


# As shipped, up to the sizes of the operands.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize(
    ("tile", "configs"),
    [
        (16, (product(128, 16, 1), weights(64, 8, 1, 2))),
        (32, (product(128, 32, 1), weights(64, 8, 1, 2))),
        (32, (product(64, 32, 0), weights(64, 4, 0, 3))),
        (64, (product(256, 32, 0), weights(32, 4, 0, 2))),
        (64, (product(16, 64, 0), weights(64, 2, 0, 1))),
        (128, (product(128, 64, 0), weights(64, 1, 0, 2))),
        (128, (product(256, 32, 0), weights(32, 2, 0, 1))),
    ],
)
def test_shipped_configurations(random, close, poison, tile, configs, dtype):
    check(close, poison, *draw(random, 130, some(random, 2, 3, 0.7), tile, tile, dtype), configs)


@pytest.mark.parametrize("split", [1, 2, 5, 9])
@pytest.mark.parametrize("rows", [0, 16, 63])
def test_every_split_of_the_tokens(random, close, poison, rows, split):
    """Parts of any length, some without a token."""
    configs = (SMALL[0], weights(16, 4, 0, split))
    check(close, poison, *draw(random, rows, some(random, 2, 7, 0.7), 16, 16, torch.float32), configs)


@pytest.mark.parametrize("configs", [SMALL, LEFT])
def test_without_bias(random, close, poison, configs):
    *operands, _ = draw(random, 17, some(random, 3, 4, 0.5), 16, 16, torch.float32)
    check(close, poison, *operands, None, configs)


def test_strided_and_broadcast_operands(random, close, poison):
    x, blocks, layout, dy, bias = draw(random, 17, some(random, 3, 4, 0.5), 32, 16, torch.float32)
    wide = random(17, 100, dtype=torch.float32)
    # Rows further apart than they are long, from the middle of another tensor; turned; one row for all.
    for x_like, dy_like in (
        (wide[:, 3:67], random(17, 128, dtype=torch.float32)[:, 7:103]),
        (x.t().contiguous().t(), dy.t().contiguous().t()),
        (x[:1].expand(17, -1), dy[:1].expand(17, -1)),
    ):
        check(close, poison, x_like, blocks.transpose(1, 2).contiguous().transpose(1, 2), layout, dy_like, bias)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
@pytest.mark.parametrize("configs", [SMALL, LEFT])
def test_blocks_of_another_dtype(random, close, poison, dtype, stored, configs):
    x, _, layout, dy, _ = draw(random, 17, some(random, 3, 4, 0.5), 16, 16, dtype)
    # What float16 can hold, so that no rounding to x's dtype tells the two apart.
    blocks = random(int(layout.sum()), 16, 16, dtype=torch.float16).to(stored)
    check(close, poison, x, blocks, layout, dy, random(48, dtype=stored), configs)


def test_the_same_bits_every_time(random):
    x, blocks, layout, dy, _ = draw(random, 65, some(random, 3, 4, 0.5), 16, 16, torch.float32)
    found = index(layout, len(blocks))
    first, second = (backward_blocks(dy, x, blocks, found, (3, 4), weights(16, 2, 0, 3)) for _ in range(2))
    assert torch.equal(first, second)


def test_sums_of_float16_do_not_overflow(random, close, poison):
    """Partial sums beyond float16's range, whose total is within it."""
    layout = torch.ones(1, 8, dtype=torch.bool)
    x = torch.ones(16, 128, dtype=torch.float16) * 100
    blocks = torch.full((8, 16, 16), 100.0, dtype=torch.float16)
    blocks[4:] *= -1
    check(close, poison, x, blocks, layout, random(16, 16, dtype=torch.float16), None)
