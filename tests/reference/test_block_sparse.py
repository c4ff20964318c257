"""block_sparse_linear: against the dense weight its tiles spell, gradients, what it multiplies, and its messages."""

import pytest
import torch
from compressft_kernels.reference import block_sparse, block_sparse_linear
from torch.utils.flop_counter import FlopCounterMode

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["tiles", "dense"])
def path(request, monkeypatch):
    """Each way to compute it, whichever is quicker for the test's shapes."""
    monkeypatch.setattr(block_sparse, "OVERHEAD", {"tiles": -float("inf"), "dense": float("inf")}[request.param])
    return request.param


def dense(blocks, layout):
    """The weight, tile by tile, in float64."""
    lines, columns = layout.shape
    _, bo, bi = blocks.shape
    weight = torch.zeros(lines * bo, columns * bi, dtype=torch.float64)
    place = 0
    for r in range(lines):
        for c in range(columns):
            if layout[r, c]:
                weight[r * bo : (r + 1) * bo, c * bi : (c + 1) * bi] = blocks[place].double()
                place += 1
    assert place == len(blocks)
    return weight


def tiles_of(matrix, layout, bo, bi):
    """The live tiles of an (out, in) matrix in row-major order."""
    live = [(r, c) for r in range(layout.shape[0]) for c in range(layout.shape[1]) if layout[r, c]]
    found = [matrix[r * bo : (r + 1) * bo, c * bi : (c + 1) * bi] for r, c in live]
    return torch.stack(found) if found else matrix.new_zeros(0, bo, bi)


def check(close, gradients, x, blocks, layout, bias, dtype=torch.float64):
    y, dy, (dx, dblocks, dbias) = gradients(lambda x, w, b: block_sparse_linear(x, w, layout, bias=b), x, blocks, bias)
    weight, dy, x = dense(blocks, layout), dy.double(), x.double()
    close(y, (x.unsqueeze(-2) * weight).sum(-1) + bias.double(), dtype)
    close(dx, (dy.unsqueeze(-1) * weight).sum(-2), dtype)
    outer = (dy.unsqueeze(-1) * x.unsqueeze(-2)).flatten(0, -3).sum(0)
    close(dblocks, tiles_of(outer, layout, *blocks.shape[1:]), dtype)
    close(dbias, dy.flatten(0, -2).sum(0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "lines", "columns", "bo", "bi"),
    [(1, 1, 1, 1, 1), (17, 5, 13, 13, 5), (65, 2, 3, 65, 21), (63, 10, 9, 1, 7)],
)
@pytest.mark.parametrize("density", [0.0, 0.3, 0.8, 1.0])
def test_equals_the_dense_product(random, path, close, gradients, rows, lines, columns, bo, bi, density, dtype):
    order = random(lines, columns).flatten().argsort().view(lines, columns)
    layout = order < round(density * lines * columns)
    blocks = random(int(layout.sum()), bo, bi, dtype=dtype)
    x, bias = random(rows, columns * bi, dtype=dtype), random(lines * bo, dtype=dtype)
    check(close, gradients, x, blocks, layout, bias, dtype)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 4, 6)])
def test_any_leading_dimensions(random, path, shape):
    layout, blocks, x = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 7, 1]]), random(4, 5, 2), random(*shape)
    y = block_sparse_linear(x, blocks, layout)
    torch.testing.assert_close(y, x @ dense(blocks, layout).t())


def test_non_contiguous_and_broadcast_operands(random, path, close, gradients):
    layout = torch.tensor([[True, False, True, True], [False, True, False, True]])
    assert not layout.t().is_contiguous()
    blocks = random(5, 3, 2).transpose(1, 2)  # (5, 2, 3)
    check(close, gradients, random(12, 4).t(), blocks, layout, random(1).expand(4))
    check(close, gradients, random(6).expand(3, 6), random(1, 2, 3).expand(5, 2, 3), layout.t(), random(8))


@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_in_pieces(random, close, gradients, monkeypatch, rows):
    """Fewer rows at a time than there are, with and without a shorter piece at the end."""
    monkeypatch.setattr(block_sparse, "CHUNK", 4)
    monkeypatch.setattr(block_sparse, "OVERHEAD", -float("inf"))
    layout = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]])
    check(close, gradients, random(rows, 8), random(4, 3, 2), layout, random(9))


def test_gradcheck(random, path):
    """On copies of the blocks: gradcheck moves its operands through `.data`, which a kept weight cannot see."""
    layout = torch.tensor([[1, 0, 1], [0, 1, 1]])
    leaves = [t.requires_grad_() for t in (random(2, 6), random(4, 3, 2), random(6))]
    assert torch.autograd.gradcheck(lambda x, w, b: block_sparse_linear(x, w.clone(), layout, bias=b), leaves)


def test_a_dead_column_and_a_dead_row(random, path):
    """Their gradients are zeros, not what the memory held."""
    layout, bias = torch.tensor([[0, 1], [0, 0]]), random(6)
    x, blocks = random(4, 4).requires_grad_(), random(1, 3, 2).requires_grad_()
    y = block_sparse_linear(x, blocks, layout, bias=bias)
    assert torch.equal(y[:, 3:], bias[3:].expand(4, 3))
    y.sum().backward()
    assert x.grad is not None and not x.grad[:, :2].any() and x.grad[:, 2:].all()


def flops(random, rows, layout, bo, bi):
    """What forward and backward multiply."""
    x = random(rows, layout.shape[1] * bi).requires_grad_()
    blocks = random(int(layout.sum()), bo, bi).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        block_sparse_linear(x, blocks, layout).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("live", [0, 1, 5, 12])
def test_only_live_tiles_are_multiplied(random, monkeypatch, live):
    monkeypatch.setattr(block_sparse, "OVERHEAD", -float("inf"))
    layout = torch.arange(12).view(3, 4).flip(1) < live
    assert flops(random, 7, layout, 2, 5) == 3 * 2 * 7 * live * 2 * 5


@pytest.mark.parametrize(
    ("tile", "live", "multiplied"), [(16, 2, 2), (16, 3, 16), (32, 4, 4), (32, 5, 16), (64, 7, 7), (64, 8, 16)]
)
def test_one_dense_product_where_it_is_quicker(random, tile, live, multiplied):
    """Of 16 tiles; the smaller the tiles, the sooner."""
    layout = torch.arange(16).view(4, 4).t() < live
    assert flops(random, 3, layout, tile, tile) == 3 * 2 * 3 * multiplied * tile * tile


def test_the_dense_weight_is_kept_until_it_changes(random, monkeypatch):
    monkeypatch.setattr(block_sparse, "OVERHEAD", float("inf"))
    built = []
    real = block_sparse.effective_weight
    monkeypatch.setattr(
        block_sparse, "effective_weight", lambda *of: real(*of[:-1], lambda: built.append(of) or of[-1]())
    )
    x, blocks = random(2, 6).requires_grad_(), random(2, 4, 3).requires_grad_()
    layout = torch.tensor([[1, 0], [0, 1]])
    y = block_sparse_linear(x, blocks, layout)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert len(built) == 1
    torch.testing.assert_close(dx, dense(blocks, layout).sum(0).expand(2, 6).detach())
    with torch.no_grad():
        blocks.neg_()
    assert torch.equal(block_sparse_linear(x, blocks, layout), -y)
    layout.copy_(torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(block_sparse_linear(x, blocks, layout), x @ dense(blocks, layout).t())
    assert len(built) == 3


def test_saves_its_operands_only(random, path):
    x, blocks = random(7, 20).requires_grad_(), random(2, 2, 5).requires_grad_()
    saved, layout = [], torch.eye(2, 4).bool()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        block_sparse_linear(x, blocks, layout)
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, blocks, layout)[: 2 if path == "tiles" else 3])


def test_under_autocast(random, path):
    layout = torch.tensor([[1, 0], [1, 1]])
    x, blocks, bias = (t.float().requires_grad_() for t in (random(4, 6), random(3, 2, 3), random(4)))
    with torch.autocast("cpu", torch.bfloat16):
        y = block_sparse_linear(x, blocks, layout, bias=bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), [x, blocks, bias])
    assert all(g.dtype == torch.float32 for g in grads)
    torch.testing.assert_close(y.double(), x.double() @ dense(blocks, layout).t() + bias, rtol=3e-2, atol=3e-2)


def test_errors_name_the_shapes(random):
    x, blocks, layout = random(2, 6), random(2, 4, 3), torch.tensor([[1, 0], [0, 1]])
    with pytest.raises(
        ValueError, match=r"block_sparse_linear: x \(2, 5\), blocks \(2, 4, 3\), layout \(2, 2\) do not"
    ):
        block_sparse_linear(x[:, :5], blocks, layout)
    with pytest.raises(ValueError, match=r"bias \(6,\) do not fit"):
        block_sparse_linear(x, blocks, layout, bias=random(6))
    with pytest.raises(ValueError, match=r"layout is torch.float64\); want"):
        block_sparse_linear(x, blocks, layout.double())
    with pytest.raises(ValueError, match=r"layout \(2, 2\) has 2 live tiles, blocks \(1, 4, 3\); want one block per"):
        block_sparse_linear(x, blocks[:1], layout)
    with pytest.raises(ValueError, match=r"x torch.float32, blocks torch.float64; want one floating dtype"):
        block_sparse_linear(x.float(), blocks, layout)
