"""The kept masked weight: rebuilt exactly when it must be, never stale, and gone with its tensors."""

import copy
import gc

import pytest
import torch
from compressft_kernels.reference import effective, masked_linear, pack_mask, packed_linear
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class Builds(TorchDispatchMode):
    """Counts how often a mask is made from scores or from bits."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.gt.Scalar_out, torch.ops.aten.bitwise_and.Tensor)
        return func(*args, **(kwargs or {}))


def builds(function):
    with Builds() as counter:
        function()
    return counter.count


@pytest.fixture
def layer(random):
    """x, weight, scores; both are parameters."""
    return random(4, 7), nn.Parameter(random(5, 7)), nn.Parameter(random(5, 7))


def check(x, weight, scores, threshold=0.0):
    want = F.linear(x, weight * (scores > threshold))
    torch.testing.assert_close(masked_linear(x, weight, scores, threshold=threshold), want, rtol=1e-12, atol=1e-12)


def test_built_once_for_forwards_and_backward(layer):
    x, weight, scores = layer[0].requires_grad_(), layer[1].detach(), layer[2]
    assert builds(lambda: masked_linear(x, weight, scores)) == 1
    assert builds(lambda: [masked_linear(x, weight, scores) for _ in range(3)]) == 0
    assert builds(lambda: masked_linear(x, weight, scores).sum().backward()) == 0
    bits = pack_mask(scores > 0)
    assert builds(lambda: [packed_linear(x, weight, bits).sum().backward() for _ in range(3)]) == 1


def test_kept_per_pair(layer, random):
    x, weight, scores = layer
    others = random(5, 7), random(5, 7)
    pairs = [(weight, scores), (weight, others[0]), (others[1], scores)]
    assert builds(lambda: [masked_linear(x, *pair) for pair in pairs * 3]) == 3
    for pair in pairs:
        check(x, *pair)


def test_another_threshold_or_dtype_is_another_weight(layer):
    for threshold in (0.0, 0.5, 0.0, -0.5, float("-inf"), 0.5):
        check(*layer, threshold=threshold)
    x = layer[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        low = masked_linear(x, *layer[1:])
    check(*layer)
    assert low.dtype == torch.bfloat16


def restrided(t):
    return t.view(7, 5).t() if t.is_contiguous() else t.t().view(5, 7)


CHANGES = {
    "mul_": lambda t: t.mul_(-1.1),
    "copy_": lambda t: t.copy_(-t),
    "one entry": lambda t: t[2, 3].neg_(),
    "through a view": lambda t: t.view(-1)[3:9].neg_(),
    "foreach": lambda t: torch._foreach_neg_([t]),
    "set_": lambda t: t.set_(-t.detach()),
    "written through .data, and said so": lambda t: (t.data.neg_(), torch.autograd.graph.increment_version(t)),
    ".data =": lambda t: setattr(t, "data", -t.data),
    ".data = same memory, other strides": lambda t: setattr(t, "data", restrided(t.data)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [1, 2])
def test_no_stale_result_after_a_change(layer, which, change):
    check(*layer)
    for _ in range(4):
        before = masked_linear(*layer).detach()
        with torch.no_grad():
            CHANGES[change](layer[which])
        check(*layer)
        if change != "one entry":
            assert not torch.equal(before, masked_linear(*layer))


def test_data_swapped_into_the_same_memory_is_seen(layer):
    """The allocator hands freed memory out again: neither the address nor the version tells the change."""
    x, weight, scores = layer
    check(x, weight, scores)
    for _ in range(20):
        weight.data = weight.data * -1.0
        check(x, weight, scores)


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0, foreach=False, fused=False),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=1.0, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1.0, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, lr=1.0, fused=True),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_no_stale_result_after_an_optimisers_step(layer, name):
    """Fused optimisers do not raise the version of what they write."""
    x, weight, scores = layer
    optimiser = OPTIMISERS[name]([weight, scores])
    for _ in range(3):
        optimiser.zero_grad()
        y = masked_linear(x, weight, scores)
        y.square().sum().backward()
        optimiser.step()
        check(x, weight, scores)
        assert not torch.equal(y, masked_linear(x, weight, scores))


def test_packed_bits_and_their_weight_may_change(random):
    x, weight, bits = random(4, 7), random(5, 7), pack_mask(random(5, 7) > 0)
    for change in (lambda: bits.bitwise_xor_(0b0010101), lambda: weight.neg_(), lambda: bits.zero_()):
        before = packed_linear(x, weight, bits)
        change()
        got = packed_linear(x, weight, bits)
        assert not torch.equal(got, before)
        assert torch.equal(got, packed_linear(x, weight.clone(), bits.clone()))


def test_a_copy_of_a_layer_has_its_own(layer):
    x, weight, scores = layer
    masked_linear(x, weight, scores)
    twin = copy.deepcopy(scores)
    with torch.no_grad():
        twin.neg_()
    check(x, weight, twin)
    check(x, weight, scores)


def entries():
    return sum(len(of_gate) for of_gate in effective._kept.values())


def alive(shape):
    gc.collect()
    return sum(1 for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.shape == shape)


@pytest.fixture
def few_objects():
    """Nothing that was there before is looked through when living tensors are counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
def test_gone_with_its_tensors(random):
    gc.collect()
    before, gates = entries(), len(effective._kept)
    weight, first, second = random(41, 43), random(41, 43), random(41, 43)
    for scores in (first, second):
        masked_linear(random(2, 43), weight, scores)
    assert entries() == before + 2 and alive((41, 43)) == 5
    del scores, second
    assert entries() == before + 1 and alive((41, 43)) == 3
    del weight
    assert entries() == before and alive((41, 43)) == 1
    del first
    assert len(effective._kept) == gates and alive((41, 43)) == 0


@pytest.mark.usefixtures("few_objects")
def test_memory_does_not_grow_in_training(random):
    x, weight, scores = random(2, 47).requires_grad_(), random(45, 47), nn.Parameter(random(45, 47))
    optimiser = torch.optim.SGD([scores], lr=0.1)
    counts = []
    for _ in range(5):
        optimiser.zero_grad()
        masked_linear(x, weight, scores).square().sum().backward()
        optimiser.step()
        masked_linear(x, weight, scores.view(45, 47))  # a gate that dies at once
        counts.append((entries(), alive((45, 47))))
    assert counts == [counts[0]] * 5
    assert counts[0][1] == 4  # weight, scores, its gradient and one masked weight


def test_inference_mode(layer):
    x, weight, scores = layer
    with torch.inference_mode():
        check(x, weight, scores)
        assert builds(lambda: masked_linear(x, weight, scores)) == 0
        unversioned = torch.ones(5, 7, dtype=torch.float64)
        check(x, weight, unversioned)
        unversioned.neg_()
        check(x, weight, unversioned)
        scores.neg_()
        check(x, weight, scores)
    assert builds(lambda: masked_linear(x.requires_grad_(), weight, scores)) == 0
    masked_linear(x, weight, scores).sum().backward()
