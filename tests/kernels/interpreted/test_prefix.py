"""The prefix attention kernels against their twin in float64."""

import pytest
import torch
from compressft_kernels.prefix_backward_triton import backward
from compressft_kernels.prefix_triton import forward
from compressft_kernels.reference.prefix import prefix_attention
from torch.nn import functional as F

DTYPES = [torch.float64, torch.float32, torch.float16]
SCALE = 0.3
# (B, Hq, Hkv, T, S, P, D), causal, lengths, (BLOCK_M, BLOCK_N)
CASES = {
    "every loop": ((2, 2, 1, 65, 63, 17, 24), True, [63, 50], (32, 16)),
    "own tiles whole": ((1, 2, 2, 17, 65, 63, 16), False, None, (16, 32)),
    "rows of three heads in a tile": ((2, 3, 1, 17, 40, 33, 5), True, [-3, 2**40], (32, 16)),
    "decoding": ((2, 4, 2, 1, 65, 1, 8), True, [65, 7 - 2**40], (16, 32)),
    "as shipped": ((1, 2, 1, 130, 130, 63, 32), True, None, (128, 64)),
    "fewer queries than keys": ((1, 4, 2, 17, 70, 16, 16), True, [61], (16, 16)),
    "more queries than keys": ((1, 1, 1, 65, 17, 3, 80), True, None, (16, 32)),
    "no own keys": ((2, 2, 1, 17, 0, 17, 16), True, None, (16, 16)),
    "no prefix": ((3, 2, 1, 20, 17, 0, 16), True, [0, 5, 17], (16, 16)),
}


def configs(block_m=16, block_n=32, programs=3):
    """The forward's configuration and the backward's three."""
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2}
    turned = blocks | {"BLOCK_M": block_n, "BLOCK_N": block_m}
    return blocks, blocks, turned, turned | {"PROGRAMS": programs}


def run(operands, do, causal=False, lengths=None, scale=SCALE, blocks=None, wanted=(True,) * 5):
    """(o, lse, gradients) by the kernels."""
    first, *rest = blocks or configs()
    o, lse = forward(*operands, causal, lengths, scale, first)
    return o, lse, backward(do, *operands, o, lse, causal, lengths, scale, *rest, wanted)


@pytest.fixture
def draw(random, poison):
    """draw((B, Hq, Hkv, T, S, P, D), dtype, prefix's dtype) -> ((q, k, v, prefix_k, prefix_v), do), amid NaNs."""

    def make(shape, dtype=torch.float64, prefix_dtype=None):
        batch, heads, kv_heads, queries, keys, size, width = shape
        q, do = (poison(random(batch, heads, queries, width, dtype=dtype)) for _ in range(2))
        k, v = (poison(random(batch, kv_heads, keys, width, dtype=dtype)) for _ in range(2))
        prefix = (poison(random(kv_heads, size, width, dtype=prefix_dtype or dtype)) for _ in range(2))
        return (q, k, v, *prefix), do

    return make


@pytest.fixture
def check(close):
    """check(operands, do, ...): o and every gradient are the twin's, in their operand's dtype; gives run's result."""

    def compare(operands, do, causal=False, lengths=None, scale=SCALE, blocks=None):
        dtype = operands[0].dtype
        leaves = [t.to(dtype).double().contiguous().requires_grad_() for t in operands]
        want = prefix_attention(*leaves, causal=causal, lengths=lengths, scale=scale)
        # An empty prefix takes no part in the twin.
        gradients = torch.autograd.grad(want, leaves, do.double().contiguous(), allow_unused=True)
        o, lse, got = run(operands, do, causal, lengths, scale, blocks)
        close(o, want.detach(), dtype)
        for operand, gradient, expected in zip(operands, got, gradients, strict=True):
            assert gradient.dtype == operand.dtype and gradient.shape == operand.shape
            coarse = torch.float16 if torch.float16 in (dtype, operand.dtype) else dtype
            close(gradient.to(coarse), torch.zeros_like(gradient).double() if expected is None else expected, coarse)
        assert lse.shape == o.shape[:3] and not lse.isnan().any()
        return o, lse, got

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_twin(draw, poison, check, case, dtype):
    shape, causal, lengths, (block_m, block_n) = CASES[case]
    lengths = None if lengths is None else poison(torch.tensor(lengths))
    check(*draw(shape, dtype), causal=causal, lengths=lengths, blocks=configs(block_m, block_n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(random, poison, check, dtype):
    """Heads inside tokens, as a projection leaves them; values and gradients broadcast; a prefix inside others."""
    q = poison(random(2, 17, 4, 16, dtype=dtype).transpose(1, 2))
    k = poison(random(2, 33, 2, 16, dtype=dtype).transpose(1, 2))
    v = poison(random(2, 1, 33, 16, dtype=dtype).expand(2, 2, 33, 16))
    do = poison(random(2, 1, 1, 1, dtype=dtype).expand(2, 4, 17, 16))
    prefix_k = poison(random(2, 5, 16, 3, dtype=dtype).transpose(2, 3)[:, :, 1])
    prefix_v = poison(random(5, 2, 16, dtype=dtype).transpose(0, 1))
    o, _, (dq, dk, _, _, _) = check((q, k, v, prefix_k, prefix_v), do, causal=True)
    assert o.stride() == dq.stride() == q.stride() and dk.stride() == k.stride()


def test_last_dimension_strided(random, poison, check):
    operands = [poison(random(1, 2, 8, 17).transpose(2, 3)) for _ in range(4)]
    prefix = [poison(random(2, 8, 5).transpose(1, 2)) for _ in range(2)]
    o, _, (dq, _, _, _, _) = check((*operands[:3], *prefix), operands[3])
    assert o.stride() == dq.stride() == operands[0].stride()


@pytest.mark.parametrize(("dtype", "prefix_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_prefix_of_another_dtype(draw, check, dtype, prefix_dtype):
    check(*draw((1, 2, 1, 17, 17, 5, 16), dtype, prefix_dtype), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_scales(draw, check, scale):
    check(*draw((1, 2, 1, 17, 33, 33, 16)), causal=True, scale=scale)


@pytest.mark.parametrize("programs", [1, 4, 1000])
def test_parts_of_the_prefix_gradient(draw, check, programs):
    check(*draw((3, 2, 1, 33, 16, 40, 16)), blocks=configs(32, 16, programs))


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 3, 16), (2, 2, 1, 0, 5, 3, 16), (2, 2, 1, 5, 0, 0, 16)], ids=str)
def test_empty(draw, check, shape):
    _, _, gradients = check(*draw(shape), causal=True)
    assert all(not g.any() for g in gradients)


def test_blind_queries(draw, check):
    """More queries than keys, causal, and a row of no length: those see nothing, give zeros and get zero gradients."""
    operands, do = draw((2, 2, 1, 33, 17, 0, 16))
    o, lse, (dq, dk, dv, _, _) = check(operands, do, causal=True, lengths=torch.tensor([17, 0]))
    blind = torch.arange(33) < 33 - 17
    for t in (o, dq):
        assert not t[0, :, blind].any() and not t[1].any() and t[0, :, ~blind].all()
    assert (lse[0, :, blind] == torch.inf).all() and (lse[1] == torch.inf).all() and lse[0, :, ~blind].isfinite().all()
    assert not dk[1].any() and not dv[1].any()


@pytest.mark.parametrize("only", [*range(5), None])
def test_wanted(draw, only):
    """What is computed does not depend on what else is."""
    operands, do = draw((2, 2, 1, 17, 17, 5, 16))
    o, lse, full = run(operands, do, causal=True)
    wanted = tuple(i == only for i in range(5))
    _, *rest = configs()
    some = backward(do, *operands, o, lse, True, None, SCALE, *rest, wanted)
    for want, got, expected in zip(wanted, some, full, strict=True):
        assert torch.equal(got, expected) if want else got is None


def test_no_prefix_is_plain_attention(draw, close):
    operands, do = draw((2, 4, 2, 33, 33, 0, 16))
    leaves = [t.clone().requires_grad_() for t in operands[:3]]
    want = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE, enable_gqa=True)
    o, _, got = run(operands, do, causal=True)
    close(o, want.detach(), torch.float64)
    for gradient, expected in zip(got[:3], torch.autograd.grad(want, leaves, do), strict=True):
        close(gradient, expected, torch.float64)


def test_zero_prefix_dilutes(draw, close):
    """P keys and values of zero add P to the softmax's denominator Z, nothing to its numerator."""
    (q, k, v, _, _), _ = draw((2, 2, 1, 17, 33, 0, 16))
    base, lse = forward(q, k, v, q.new_zeros(1, 0, 16), q.new_zeros(1, 0, 16), False, None, SCALE, configs()[0])
    zeros = q.new_zeros(1, 37, 16)
    o, _ = forward(q, k, v, zeros, zeros, False, None, SCALE, configs()[0])
    denominator = lse.exp2()[..., None]
    close(o, base * denominator / (denominator + 37), torch.float64)


def test_parts_merge_by_their_lse(draw, close):
    """Prefix alone and own keys alone, weighted by their denominators, are both together."""
    (q, k, v, prefix_k, prefix_v), _ = draw((2, 4, 2, 17, 33, 35, 16))
    none = (k[:, :, :0], v[:, :, :0])
    o, lse = forward(q, k, v, prefix_k, prefix_v, True, None, SCALE, configs()[0])
    o_own, lse_own = forward(q, k, v, prefix_k[:, :0], prefix_v[:, :0], True, None, SCALE, configs()[0])
    o_prefix, lse_prefix = forward(q, *none, prefix_k, prefix_v, True, None, SCALE, configs()[0])
    close(lse, torch.logaddexp2(lse_own, lse_prefix), torch.float64)
    own, prefix = (lse_own - lse).exp2()[..., None], (lse_prefix - lse).exp2()[..., None]
    close(o, own * o_own + prefix * o_prefix, torch.float64)
