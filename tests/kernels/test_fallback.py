"""A kernel that does not compile for its device: plain torch takes its place, says so once, and is right."""

import copy
import os

import pytest
import torch
from compressft_kernels import (
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
from compressft_kernels.dispatch import pretending
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")

CPU = torch.device("cpu")
LAYOUT = torch.tensor([[1, 0, 1], [0, 1, 1]])
LENGTHS = torch.tensor([4, 9])
BITS = pack_mask(torch.arange(5 * 7).view(5, 7) % 3 > 0)


def bottleneck(f, x, wd, bd, wu, bu, r, g, b):
    return f.adapter(x, wd, bd, wu, bu, activation="silu", scale=0.5, residual=r, norm=(g, b, 1e-3))


def on_its_input(f, x, wd, wu):
    return f.adapter(x, wd, None, wu, None, residual=x)


def masked(f, x, w, s, b):
    return f.masked_linear(x, w, s, threshold=0.125, bias=b)


def packed(f, x, w, b):
    return f.packed_linear(x, w, BITS, bias=b)


def sparse(f, x, w, b):
    return f.block_sparse_linear(x, w, LAYOUT, bias=b)


def prefix(f, q, k, v, pk, pv):
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return f.prefix_attention(q, k, v, pk, pv, causal=True, lengths=LENGTHS)


class Ours:
    """The public functions, to be called in the place of the twins in `reference`."""

    masked_linear, packed_linear = staticmethod(masked_linear), staticmethod(packed_linear)
    block_sparse_linear, adapter = staticmethod(block_sparse_linear), staticmethod(adapter)
    prefix_attention = staticmethod(prefix_attention)


# operation -> [(function, shapes of its operands)]; one row too, whose sums are its operands.
CALLS = {
    "adapter": [
        (bottleneck, [(2, 3, 7), (3, 7), (3,), (5, 3), (5,), (2, 3, 5), (7,), (7,)]),
        (on_its_input, [(1, 7), (3, 7), (7, 3)]),
    ],
    "masked_linear": [(masked, [(2, 4, 7), (5, 7), (5, 7), (5,)]), (masked, [(1, 7), (5, 7), (5, 7), (5,)])],
    "packed_linear": [(packed, [(2, 4, 7), (5, 7), (5,)])],
    "block_sparse_linear": [(sparse, [(4, 48), (4, 16, 16), (32,)])],
    "prefix_attention": [(prefix, [(2, 5, 4, 16), (2, 9, 2, 16), (2, 2, 9, 16), (2, 3, 16), (2, 3, 16)])],
}


@pytest.fixture
def idle(monkeypatch):
    """A device of sm_90 on which launches do nothing: what it has of shared memory, and the fault that it reports."""
    from compressft_kernels import ahead_triton
    from triton.compiler import compiler

    class Utilities:
        shared, fault = 227 * 1024, None

        def get_device_properties(self, device):
            return {"max_shared_mem": self.shared}

        def load_binary(self, *_):
            if self.fault is not None:
                raise RuntimeError(self.fault)
            return 1, 1, 0, 0, 1024

    utilities = Utilities()
    compiler.max_shared_mem.cache_clear()
    monkeypatch.setattr(ahead_triton._Absent, "utils", utilities, raising=False)
    launcher = staticmethod(lambda source, metadata: lambda *_: None)
    monkeypatch.setattr(ahead_triton._Absent, "launcher_cls", launcher, raising=False)
    monkeypatch.setattr(dispatch, "_failures", {})
    monkeypatch.setattr(dispatch, "TABLE", copy.deepcopy(dispatch.TABLE))
    with pretending("sm_90"), ahead_triton.target(90):
        yield utilities


def break_rows(*kernels):
    """No configuration of these kernels compiles: sizes of blocks are powers of two."""
    for kernel in kernels:
        for row in dispatch.TABLE["sm_90"][kernel]:
            row["config"].update({name: 48 for name in row["config"] if name.startswith("BLOCK_")})


def draw(shapes, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(function, tensors, library=Ours):
    """(y, gradients of all operands)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(library, *leaves)
    return y.detach(), torch.autograd.grad(y, leaves, y.detach().cos())


def check(got, function, tensors):
    """Within a few roundings of the twin in float64."""
    want = run(function, [t.double() for t in tensors], reference)
    for one, other, like in zip((got[0], *got[1]), (want[0], *want[1]), (tensors[0], *tensors), strict=True):
        assert one.dtype == like.dtype and one.shape == other.shape
        bound = 4 * torch.finfo(one.dtype).eps * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, atol=bound, rtol=0.0)


def warned(operation, why=r"_\w+_kernel does not compile there \(CompilationError: .*power of 2"):
    return pytest.warns(UserWarning, match=f"^{operation} is plain torch on cpu from now on: {why}")


KERNELS = {
    "adapter": ("adapter", "adapter_rows", "adapter_weights"),
    "masked_linear": ("product", "product_turned", "gradient"),
    "packed_linear": ("product", "product_turned", "gradient"),
    "block_sparse_linear": ("block_sparse", "block_sparse_turned", "block_sparse_blocks"),
    "prefix_attention": ("prefix", "prefix_dq", "prefix_dkv", "prefix_dprefix"),
}


@pytest.mark.parametrize("operation", CALLS)
def test_the_twin_takes_its_place_and_says_so_once(idle, operation):
    break_rows(*KERNELS[operation])
    for function, shapes in CALLS[operation]:
        tensors = draw(shapes)
        dispatch._failures.clear()
        assert explain(operation, device="sm_90", dtype=torch.float16).startswith(f"{operation}: Triton kernel")
        with warned(operation) as said:
            got = run(function, tensors)
        assert len(said) == 1 and len(str(said[0].message).splitlines()) == 1
        check(got, function, tensors)
        check(run(function, tensors), function, tensors)  # a warning would be an error
    assert explain(operation, device="cpu") == f"{operation}: plain torch ({dispatch.failure(operation, CPU)})"
    with torch.profiler.profile() as profile:
        run(function, tensors)
    assert not any(event.key.startswith("compressft::") for event in profile.key_averages())


@pytest.mark.parametrize("operation", CALLS)
def test_under_autocast(idle, operation):
    """Operands come in autocast's dtype next to weights in their own, whose gradients have it too."""
    break_rows(*KERNELS[operation])
    for function, shapes in CALLS[operation]:
        dispatch._failures.clear()
        tensors = draw(shapes, torch.float32)
        with torch.autocast("cpu", torch.bfloat16), warned(operation):
            y, gradients = run(function, tensors)
        want = run(function, [t.double() for t in tensors], reference)
        assert [g.dtype for g in gradients] == [torch.float32] * len(tensors)
        for got, other in zip((y, *gradients), (want[0], *want[1]), strict=True):
            bound = 6 * torch.finfo(torch.bfloat16).eps * max(1.0, other.abs().max().item())
            torch.testing.assert_close(got.double(), other, atol=bound, rtol=0.0)


class Watch(TorchDispatchMode):
    """The operators that are called, with their arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.namespace == "compressft":
            self.calls.append((operator, args, out))
        return out


@pytest.mark.parametrize("operation", CALLS)
def test_its_results_lie_in_memory_as_the_operator_declares(idle, operation):
    """A compiled graph relies on it."""
    break_rows(*KERNELS[operation])
    function, shapes = CALLS[operation][0]
    with Watch() as watch, warned(operation):
        run(function, draw(shapes))
    assert len(watch.calls) == 2
    for operator, args, out in watch.calls:
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        with FakeTensorMode() as mode:
            fakes = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        for got, fake in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (out, fakes)), strict=True):
            assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_gradients_alone(idle):
    """What was computed by the kernel has its gradients from the twin, and what comes after is all the twin's."""
    break_rows("adapter_rows")
    function, shapes = CALLS["adapter"][1]
    tensors = draw(shapes)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(Ours, *leaves)  # by the kernel, which does nothing on this device
    dy = function(reference, *tensors).cos()
    with warned("adapter"):
        got = torch.autograd.grad(y, leaves, dy)
    check((function(Ours, *tensors), got), function, tensors)


def test_what_does_not_fit_on_the_device(idle):
    idle.shared = 1000
    function, shapes = CALLS["adapter"][1]
    tensors = draw(shapes, torch.bfloat16)
    with warned("adapter", r"_forward_kernel does not compile there \(OutOfResources: out of resource: shared memory"):
        got = run(function, tensors)
    check(got, function, tensors)


def test_a_fault_of_the_device_is_raised(idle):
    """Only what the compiler says is taken for a kernel that does not compile."""
    idle.fault = "Triton Error [CUDA]: an illegal memory access was encountered"
    function, shapes = CALLS["adapter"][1]
    with dispatch.kernels_for_float32(), pytest.raises(RuntimeError, match="illegal memory access"):
        run(function, draw(shapes, torch.float32))
    assert not dispatch._failures
