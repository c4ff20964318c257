"""The twins under a compiler and on fake tensors: one graph, the same results, the right shapes."""

import onnxruntime
import pytest
import torch
import torch.utils.checkpoint
from compressft_kernels import (
    block_sparse_linear,
    masked_linear,
    pack_mask,
    packed_linear,
    prefix_attention,
    unpack_mask,
)
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = pytest.mark.dear

MASK = torch.arange(5 * 7).view(5, 7) % 3 > 0
LAYOUT = torch.tensor([[1, 0, 1], [0, 1, 1]])

# name -> (function of the operands and the constant, shapes of the operands, the constant)
CALLS = {
    "masked": (
        lambda x, w, s, b, c: masked_linear(x, w, s, threshold=0.1, bias=b),
        [(4, 7), (5, 7), (5, 7), (5,)],
        None,
    ),
    "packed": (lambda x, w, b, c: packed_linear(x, w, c, bias=b), [(4, 7), (5, 7), (5,)], pack_mask(MASK)),
    "pack": (lambda x, c: x * unpack_mask(pack_mask(c), 7), [(5, 7)], MASK),
    "block sparse": (lambda x, w, b, c: block_sparse_linear(x, w, c, bias=b), [(2, 4, 6), (4, 3, 2), (6,)], LAYOUT),
    "prefix": (
        lambda *t: prefix_attention(*t[:5], causal=True, lengths=t[5]),
        [(2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8), (2, 3, 8), (2, 3, 8)],
        torch.tensor([4, 9]),
    ),
    "no prefix": (
        lambda *t: prefix_attention(*t[:3], t[0].new_zeros(2, 0, 8), t[0].new_zeros(2, 0, 8), lengths=t[3]),
        [(2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)],
        torch.tensor([0, 9]),
    ),
}


# Dynamo itself makes an instance of autograd.Function to trace one.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("name", CALLS)
def test_compiled_to_one_graph(random, gradients, name):
    function, shapes, constant = CALLS[name]
    tensors = [random(*shape) for shape in shapes]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, dy, grads = gradients(lambda *leaves: compiled(*leaves, constant), *tensors)
        leaves = [t.detach().requires_grad_() for t in tensors]
        want = function(*leaves, constant)
        torch.testing.assert_close(y, want)
        for got, expected in zip(grads, torch.autograd.grad(want, leaves, dy), strict=True):
            torch.testing.assert_close(got, expected)
        tensors = [-t for t in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_on_fake_tensors(random, name):
    function, shapes, constant = CALLS[name]
    tensors = [random(*shape) for shape in shapes]
    want = function(*tensors, constant)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t).requires_grad_() for t in tensors]
        y = function(*fake, None if constant is None else mode.from_tensor(constant))
        grads = torch.autograd.grad(y.sum(), fake)
    assert y.shape == want.shape and y.dtype == want.dtype
    assert [g.shape for g in grads] == [t.shape for t in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_under_checkpointing(random, gradients, name):
    function, shapes, constant = CALLS[name]
    tensors = [random(*shape) for shape in shapes]
    y, dy, grads = gradients(
        lambda *leaves: torch.utils.checkpoint.checkpoint(function, *leaves, constant, use_reentrant=False), *tensors
    )
    leaves = [t.requires_grad_() for t in tensors]
    want = function(*leaves, constant)
    assert torch.equal(y, want)
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, dy), strict=True):
        assert torch.equal(got, expected)


class Everything(torch.nn.Module):
    """All twins in a row, their weights as parameters and their masks as buffers."""

    def __init__(self, random):
        super().__init__()
        shapes = {"weight": (5, 7), "scores": (5, 7), "second": (6, 5), "blocks": (3, 4, 3), "prefix": (2, 3, 4)}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(random(*shape, dtype=torch.float32)))
        self.register_buffer("bits", pack_mask(random(6, 5) > 0))
        self.register_buffer("layout", torch.tensor([[1, 0], [1, 1]]))

    def forward(self, x):
        y = packed_linear(masked_linear(x, self.weight, self.scores), self.second, self.bits)
        q = block_sparse_linear(y, self.blocks, self.layout).unflatten(-1, (2, 4)).transpose(1, 2)
        return prefix_attention(q, q, q, self.prefix, self.prefix, causal=True)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")  # copyreg, on torch's own
def test_as_onnx(random, tmp_path):
    model, x = Everything(random).eval(), random(2, 6, 7, dtype=torch.float32)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach())
