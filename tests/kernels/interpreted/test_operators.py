"""The public functions on their kernels: as autograd, the compiler, autocast and checkpointing see them."""

import pytest
import torch
import torch.utils.checkpoint
from compressft_kernels import (
    NF4,
    adapter,
    block_sparse_linear,
    dispatch,
    explain,
    masked_linear,
    pack_mask,
    packed_linear,
    prefix_attention,
    reference,
)
from compressft_kernels.nf4 import dequantise
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.share import drawn

BITS = pack_mask(torch.arange(5 * 7).view(5, 7) % 3 > 0)
LAYOUT = torch.tensor([[1, 0, 1], [0, 1, 1]])
LENGTHS = torch.tensor([4, 9])
STORED = NF4.quantise(torch.linspace(-2, 1, 5 * 64).sin().view(5, 64))


def masked(f, x, w, s, b):
    return f.masked_linear(x, w, s, threshold=0.125, bias=b)


def packed(f, x, w, b):
    return f.packed_linear(x, w, BITS.to(x.device), bias=b)


def stored(f, x, s, b):
    return f.masked_linear(x, STORED, s, bias=b)


def sparse(f, x, w, b):
    return f.block_sparse_linear(x, w, LAYOUT, bias=b)


def bottleneck(f, x, wd, bd, wu, bu, r, g, b):
    return f.adapter(x, wd, bd, wu, bu, activation="silu", scale=0.5, residual=r, norm=(g, b, 1e-5))


def residual(f, x, wd, wu, bu):
    return f.adapter(x, wd, None, wu, bu, residual=x)


def prefix(f, q, k, v, pk, pv):
    return f.prefix_attention(q, k, v, pk, pv, causal=True, lengths=LENGTHS)


def alone(f, q, k, v, pk, pv):
    return f.prefix_attention(q, k, v, pk, pv)


class Ours:
    """The public functions, to be called in the place of the twins in `reference`."""

    masked_linear, packed_linear = staticmethod(masked_linear), staticmethod(packed_linear)
    block_sparse_linear, adapter = staticmethod(block_sparse_linear), staticmethod(adapter)
    prefix_attention = staticmethod(prefix_attention)


# name -> (function, shapes of its operands, the operand whose gradient is a surrogate)
CALLS = {
    "masked": (masked, [(2, 4, 7), (5, 7), (5, 7), (5,)], 2),
    "packed": (packed, [(2, 4, 7), (5, 7), (5,)], None),
    "stored in 4 bits": (stored, [(4, 64), (5, 64), (5,)], 1),
    "block sparse": (sparse, [(4, 48), (4, 16, 16), (32,)], None),
    "adapter": (bottleneck, [(2, 3, 7), (3, 7), (3,), (5, 3), (5,), (2, 3, 5), (7,), (7,)], None),
    "adapter on its input": (residual, [(4, 7), (3, 7), (7, 3), (7,)], None),
    "prefix": (prefix, [(2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16), (2, 3, 16), (2, 3, 16)], None),
    "empty prefix": (alone, [(2, 2, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16), (2, 0, 16), (2, 0, 16)], None),
}


@pytest.fixture(params=drawn(4, CALLS))
def call(request, random):
    function, shapes, surrogate = CALLS[request.param]
    return function, [random(*shape) for shape in shapes], surrogate


def run(function, tensors, library=Ours):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(library, *leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def same(got, want, atol=1e-10):
    assert got[0].dtype == want[0].dtype
    torch.testing.assert_close(got[0], want[0], atol=atol, rtol=atol)
    for one, other in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=atol)


def test_a_kernel_runs(call):
    """What the rest of this file rests on: the public function calls the operator, not the twin."""
    function, tensors, _ = call
    with torch.profiler.profile() as profile:
        function(Ours, *tensors)
    assert any(event.key.startswith("compressft::") for event in profile.key_averages())


def test_equals_the_twin(call):
    function, tensors, _ = call
    same(run(function, tensors), run(function, tensors, reference))


def test_gradcheck(call):
    function, tensors, surrogate = call
    leaves = [t.requires_grad_(place != surrogate) for place, t in enumerate(tensors)]
    assert torch.autograd.gradcheck(lambda *t: function(Ours, *t), leaves, fast_mode=True)


def test_the_scores_gradient_is_the_straight_through_estimator(random):
    x, w, s, dy = random(4, 7), random(5, 7), random(5, 7).requires_grad_(), random(4, 5)
    (got,) = torch.autograd.grad(masked_linear(x, w, s), s, dy)
    torch.testing.assert_close(got, dy.t() @ x * w)
    x, s = random(4, 64), random(5, 64).requires_grad_()
    (got,) = torch.autograd.grad(masked_linear(x, STORED, s), s, dy)
    dense = dequantise(STORED.packed, STORED.tables(), STORED.shape, torch.float64)
    torch.testing.assert_close(got, dy.t() @ x * dense)


def test_only_what_requires_grad(call):
    function, tensors, _ = call
    dy = run(function, tensors)[0].cos()
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(function(reference, *leaves), leaves, dy)
    for place, expected in enumerate(want):
        leaves = [t.clone().requires_grad_(p == place) for p, t in enumerate(tensors)]
        function(Ours, *leaves).backward(dy)
        torch.testing.assert_close(leaves[place].grad, expected, atol=1e-10, rtol=1e-10)
        assert all(leaf.grad is None for p, leaf in enumerate(leaves) if p != place)


@pytest.mark.parametrize("name", CALLS)
def test_compiled_to_one_graph(random, name):
    function, shapes, _ = CALLS[name]
    compiled = torch.compile(lambda *t: function(Ours, *t), backend="aot_eager", fullgraph=True)
    for tensors in ([random(*shape) for shape in shapes], [random(*shape) for shape in shapes]):
        same(run(lambda f, *t: compiled(*t), tensors), run(function, tensors, reference))


def test_compiled_in_float32_and_again_after_a_failure(random, monkeypatch):
    """What dispatch asks is asked at tracing; a kernel that did not compile is not in the next graph."""
    monkeypatch.setattr(dispatch, "_failures", {("masked_linear", "cpu"): "does not compile"})
    function, shapes, _ = CALLS["adapter on its input"]
    compiled = torch.compile(lambda *t: function(Ours, *t), backend="aot_eager", fullgraph=True)
    tensors = [random(*shape, dtype=torch.float32) for shape in shapes]
    for fails in (False, True):
        if fails:
            dispatch._failures["adapter", "cpu"] = "does not compile"
        with torch.profiler.profile() as profile:
            got = run(lambda f, *t: compiled(*t), tensors)
        same(got, run(function, tensors, reference), atol=1e-5)
        assert any(event.key.startswith("compressft::") for event in profile.key_averages()) is not fails


def test_on_fake_tensors(call):
    function, tensors, _ = call
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(Ours, *leaves)
    want = y, *torch.autograd.grad(y.sum(), leaves)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(t).requires_grad_() for t in tensors]
        y = function(Ours, *leaves)
        grads = torch.autograd.grad(y.sum(), leaves)
    for got, expected in zip((y, *grads), want, strict=True):
        assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(call, reentrant):
    function, tensors, _ = call

    def checkpointed(f, *leaves):
        return torch.utils.checkpoint.checkpoint(lambda *t: function(f, *t), *leaves, use_reentrant=reentrant)

    if not reentrant:
        same(run(checkpointed, tensors), run(function, tensors), atol=0.0)
        return
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = checkpointed(Ours, *leaves)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64))
    same((y.detach(), [leaf.grad for leaf in leaves]), run(function, tensors), atol=0.0)


def test_under_autocast(call):
    """float32 operands are multiplied in autocast's dtype, as by a torch layer; gradients come back in float32."""
    function, tensors, _ = call
    tensors = [t.float() for t in tensors]
    with torch.autocast("cpu", torch.float16):
        y, grads = run(function, tensors)
        want = run(function, tensors, reference)
    assert y.dtype == want[0].dtype
    assert [g.dtype for g in grads] == [torch.float32] * len(grads)
    exact = run(function, [t.double() for t in tensors], reference)
    for got, expected in zip((y, *grads), (exact[0], *exact[1]), strict=True):
        scale = expected.abs().max().clamp(min=1.0) if expected.numel() else 1.0
        assert ((got.double() - expected).abs() <= 1e-2 * scale).all()


@pytest.mark.parametrize("name", [name for name in CALLS if name != "empty prefix"])
def test_operator_registration(random, name):
    """torch's own checks of the schema, of aliasing, of the fake implementation and of autograd's registration."""
    function, shapes, _ = CALLS[name]
    tensors = [random(*shape).requires_grad_() for shape in shapes]
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "compressft":
                calls.append((operator, args))
            return operator(*args, **(kwargs or {}))

    with Watch():
        y = function(Ours, *tensors)
        torch.autograd.grad(y.sum(), tensors)
    assert len(calls) == 2
    for operator, args in calls:
        args = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    # The forward with gradients, on operands as the public function gives them.
    operator, args = calls[0]
    kept = tuple(
        a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
    )
    torch.library.opcheck(operator, kept, test_utils=("test_autograd_registration",))


def test_what_the_adapter_saves(random):
    """x, the pre-activation and two statistics a row: 2r + 8 bytes a token in half precision besides x."""
    tokens, width, size = 64, 32, 16
    x, wd, wu = random(tokens, width, dtype=torch.float16), random(size, width), random(width, size)
    gamma, beta = random(width, dtype=torch.float16), random(width, dtype=torch.float16)
    x, wd, wu = (t.half().requires_grad_() for t in (x, wd, wu))
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(t.data_ptr(), t), lambda t: t):
        adapter(x, wd, None, wu, None, residual=x, norm=(gamma, beta, 1e-5))
    own = {t.data_ptr() for t in (x, wd, wu, gamma, beta)}
    extra = sum(t.numel() * t.element_size() for pointer, t in seen.items() if pointer not in own)
    assert extra == tokens * (2 * size + 8)


def test_nothing_is_saved_without_gradients(random):
    x, wd, wu = random(4, 7), random(3, 7), random(7, 3)
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if operator.namespace == "compressft":
                calls.append(out)
            return out

    with Watch():
        adapter(x, wd, None, wu, None)
        with torch.no_grad():
            adapter(x.requires_grad_(), wd, None, wu, None)
    assert [z.numel() for _, z, _, _ in calls] == [0, 0]


def test_the_masked_weight_is_neither_kept_nor_saved(random):
    x, w, s = random(3, 64).requires_grad_(), random(32, 64).requires_grad_(), random(32, 64).requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        masked_linear(x, w, s)
    large = [t.data_ptr() for t in seen if t.numel() == w.numel()]
    assert sorted(large) == sorted((w.data_ptr(), s.data_ptr()))


def test_a_layout_that_changes_is_read_again(random):
    x, blocks = random(4, 48), random(3, 16, 16)
    layout = torch.tensor([[1, 0, 1], [0, 1, 0]])
    before = block_sparse_linear(x, blocks, layout)
    layout[1] = torch.tensor([1, 0, 0])
    after = block_sparse_linear(x, blocks, layout)
    assert torch.equal(before[:, :16], after[:, :16])
    torch.testing.assert_close(after, reference.block_sparse_linear(x, blocks, layout))
    layout[1, 1] = 1
    with pytest.raises(ValueError, match="layout \\(2, 3\\) has 4 live tiles, blocks have 3"):
        block_sparse_linear(x, blocks, layout)


def test_bf16_takes_the_twin(call):
    function, tensors, _ = call
    tensors = [t.bfloat16() for t in tensors]
    assert torch.equal(function(Ours, *tensors), function(reference, *tensors))
    assert "interpreter multiplies bf16 wrongly" in explain("adapter", dtype=torch.bfloat16)
    assert "interpreted on the CPU" in explain("adapter", dtype=torch.float16)


def test_sizes_without_a_kernel_take_the_twin(random):
    x, wd, wu = random(2, 4), random(257, 4), random(4, 257)
    with torch.profiler.profile() as profile:
        y = adapter(x, wd, None, wu, None)
    assert not any(event.key.startswith("compressft::") for event in profile.key_averages())
    torch.testing.assert_close(y, reference.adapter(x, wd, None, wu, None))


def test_lengths_of_any_strides(random):
    """One length expanded over the batch, and every second one of a longer tensor."""
    q, k, v = (random(3, 2, 5, 8, dtype=torch.float32) for _ in range(3))
    front = [random(2, 3, 8, dtype=torch.float32) for _ in range(2)]
    for lengths in (torch.tensor([2]).expand(3), torch.tensor([5, 0, 2, 0, 3, 0])[::2]):
        ours = prefix_attention(q, k, v, *front, lengths=lengths)
        torch.testing.assert_close(ours, reference.prefix_attention(q, k, v, *front, lengths=lengths))
