"""prefix_attention: against softmax written out query by query, its identities, dead rows, and its messages."""

import pytest
import torch
from compressft_kernels.reference import prefix_attention
from compressft_kernels.reference.prefix import prefix_gradients
from torch.nn import functional as F

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("q", "k", "v", "prefix_k", "prefix_v")

# B, Hq, Hkv, T, S, D, P
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 17, 17, 8, 5),
    (3, 2, 2, 5, 65, 17, 0),
    (2, 3, 1, 17, 63, 16, 17),
    (2, 6, 2, 1, 130, 16, 3),
    (2, 2, 1, 9, 4, 8, 2),
    (2, 2, 2, 9, 4, 8, 0),
    (2, 2, 2, 3, 0, 8, 4),
]


def operands(random, batch, heads, kv_heads, queries, keys, width, size, dtype=torch.float64):
    shapes = [(batch, heads, queries, width), *[(batch, kv_heads, keys, width)] * 2, *[(kv_heads, size, width)] * 2]
    return [random(*shape, dtype=dtype) for shape in shapes]


def formula(q, k, v, prefix_k, prefix_v, causal=False, lengths=None, scale=None):
    """Query by query: the visible keys as a list, their weights by exp, the weighted sum of their values."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    rows = []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for t in range(queries):
                seen = keys if lengths is None else max(0, min(keys, int(lengths[b])))
                if causal:
                    seen = max(0, min(seen, keys - queries + t + 1))
                all_k = torch.cat([prefix_k[g], k[b, g, :seen]])
                all_v = torch.cat([prefix_v[g], v[b, g, :seen]])
                if len(all_k) == 0:
                    rows.append(q[b, h, t] * 0.0)
                    continue
                logits = (all_k * q[b, h, t]).sum(-1) * scale
                weights = (logits - logits.max().detach()).exp()
                rows.append((weights.unsqueeze(-1) * all_v).sum(0) / weights.sum())
    return torch.stack(rows).view(q.shape) if rows else q * 0.0


def check(close, gradients, tensors, dtype=torch.float64, **options):
    taking_part = 5 if tensors[3].shape[1] else 3
    tensors = [t.detach() for t in tensors]

    def run(function, values, rest):
        return gradients(lambda *leaves: function(*leaves, *rest, **options), *values)

    o, dy, grads = run(prefix_attention, tensors[:taking_part], tensors[taking_part:])
    doubles = [t.double().requires_grad_() for t in tensors]
    want = formula(*doubles, **options)
    wants = torch.autograd.grad(want, doubles[:taking_part], dy.double(), allow_unused=True)
    close(o, want.detach(), dtype)
    for got, expected, leaf in zip(grads, wants, doubles[:taking_part], strict=True):
        close(got, torch.zeros_like(leaf) if expected is None else expected, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_formula(random, close, gradients, shape, causal, padded):
    tensors = operands(random, *shape)
    lengths = torch.tensor([0, shape[4], max(0, shape[4] - 2)][: shape[0]]) if padded else None
    check(close, gradients, tensors, causal=causal, lengths=lengths)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("causal", "padded"), [(False, False), (True, False), (True, True)])
def test_gradients_without_autograd(random, shape, causal, padded):
    leaves = [t.requires_grad_() for t in operands(random, *shape)]
    lengths = torch.tensor([0, shape[4], max(0, shape[4] - 2)][: shape[0]]) if padded else None
    options = {"causal": causal, "lengths": lengths, "scale": 0.7}
    o = prefix_attention(*leaves, **options)
    do = random(*o.shape)
    with torch.no_grad():
        got = prefix_gradients(do, *leaves, **options)
    for one, other in zip(got, torch.autograd.grad(o, leaves, do), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"lengths": torch.tensor([3, 9])}, {"scale": 0.7}])
def test_every_dtype(random, close, gradients, dtype, options):
    check(close, gradients, operands(random, 2, 4, 2, 5, 9, 8, 3, dtype=dtype), dtype, **options)


def test_non_contiguous_and_broadcast_operands(random, close, gradients):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 2, 5, 9, 8, 3)
    q = random(2, 5, 4, 8).transpose(1, 2)
    k = random(2, 2, 8, 9).transpose(2, 3)
    prefix_k = random(3, 2, 8).transpose(0, 1)
    prefix_v = random(1, 1, 8).expand(2, 3, 8)
    check(close, gradients, [q, k, v[:1].expand(2, -1, -1, -1), prefix_k, prefix_v], causal=True)


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
@pytest.mark.parametrize("options", [{}, {"causal": True}])
@pytest.mark.parametrize("size", [0, 3])
def test_empty_batches(random, batch, queries, options, size):
    tensors = [t.requires_grad_() for t in operands(random, batch, 4, 2, queries, 9, 8, size)]
    lengths = torch.full((batch,), 4)
    for more in ({}, {"lengths": lengths}):
        o = prefix_attention(*tensors, **options, **more)
        assert o.shape == (batch, 4, queries, 8)
        grads = torch.autograd.grad(o.sum(), tensors)
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "lengths": torch.tensor([0, 3])}])
@pytest.mark.parametrize("size", [0, 2])
def test_gradcheck(random, options, size):
    leaves = [t.requires_grad_() for t in operands(random, 2, 2, 1, 3, 4, 3, size)]
    fixed = [] if size else [t.detach() for t in leaves[3:]]
    leaves = leaves if size else leaves[:3]
    assert torch.autograd.gradcheck(lambda *t: prefix_attention(*t, *fixed, **options), leaves)


# Identities.


@pytest.mark.parametrize("causal", [False, True])
def test_no_prefix_is_plain_attention(random, causal):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 4, 9, 9, 8, 0)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert torch.equal(prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal), want)


def test_a_prefix_is_keys_and_values_in_front(random):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 4, 5, 9, 8, 3)
    batch = [torch.cat([p.expand(2, -1, -1, -1), t], dim=2) for p, t in ((prefix_k, k), (prefix_v, v))]
    weights = (q @ batch[0].transpose(2, 3) / 8**0.5).softmax(-1)
    torch.testing.assert_close(prefix_attention(q, k, v, prefix_k, prefix_v), weights @ batch[1])


def partition(q, k):
    """Z, the sum of exp(logits), (B, H, T, 1)."""
    return (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).exp().sum(-1, keepdim=True)


def test_a_prefix_of_zeros_takes_its_share(random):
    """Zero keys weigh exp(0) each and zero values add nothing: Z / (Z + P) of the attention without them."""
    q, k, v, prefix_k, _ = operands(random, 2, 4, 4, 5, 9, 8, 7)
    zeros = torch.zeros_like(prefix_k)
    base, z = prefix_attention(q, k, v, zeros[:, :0], zeros[:, :0]), partition(q, k)
    torch.testing.assert_close(prefix_attention(q, k, v, zeros, zeros), base * z / (z + 7))


def test_log_sum_exp_merge(random):
    """Attention over prefix and own keys apart, merged by their log-sum-exp, is attention over both."""
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 4, 5, 9, 8, 7)
    nothing = k[:, :, :0]
    own = prefix_attention(q, k, v, prefix_k[:, :0], prefix_v[:, :0])
    front = prefix_attention(q, nothing, nothing, prefix_k, prefix_v)
    share = torch.sigmoid(partition(q, prefix_k.expand(2, -1, -1, -1)).log() - partition(q, k).log())
    torch.testing.assert_close(prefix_attention(q, k, v, prefix_k, prefix_v), share * front + (1 - share) * own)


def test_a_prefix_that_is_never_looked_at_is_the_identity(random):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 4, 5, 9, 8, 7)
    q = q.abs()
    base = prefix_attention(q, k, v, prefix_k[:, :0], prefix_v[:, :0])
    torch.testing.assert_close(prefix_attention(q, k, v, torch.full_like(prefix_k, -1e4), prefix_v), base)


@pytest.mark.parametrize("size", [0, 3])
def test_decoding_step_by_step_equals_the_whole(random, size):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 2, 9, 9, 8, size)
    whole = prefix_attention(q, k, v, prefix_k, prefix_v, causal=True)
    for start, stop in ((0, 1), (1, 4), (4, 8), (8, 9)):
        part = (q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop])
        got = prefix_attention(*part, prefix_k, prefix_v, causal=True)
        torch.testing.assert_close(got, whole[:, :, start:stop])


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_not_there(random, causal):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 2, 9, 9, 8, 3)
    o = prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal, lengths=torch.tensor([6, 99]))
    alone = [t[:1, :, :6] for t in (q, k, v)]
    torch.testing.assert_close(o[:1, :, :6], prefix_attention(*alone, prefix_k, prefix_v, causal=causal))
    torch.testing.assert_close(o[1:], prefix_attention(q[1:], k[1:], v[1:], prefix_k, prefix_v, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing(random, dtype, causal):
    """Zeros and zero gradients, and it changes nothing for the other rows."""
    tensors = operands(random, 2, 4, 2, 7, 7, 8, 0, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors]
    o = prefix_attention(*leaves, causal=causal, lengths=torch.tensor([0, 5]))
    assert not o[0].any() and o[1].all()
    grads = torch.autograd.grad(o.float().square().sum() + o.sum(), leaves[:3])
    assert not any(g[0].any() for g in grads)
    alone = [t[1:].detach().requires_grad_() for t in tensors[:3]]
    other = prefix_attention(*alone, *tensors[3:], causal=causal, lengths=torch.tensor([5]))
    assert torch.equal(o[1:], other)
    for got, want in zip(grads, torch.autograd.grad(other.float().square().sum() + other.sum(), alone), strict=True):
        assert torch.isfinite(got).all() and torch.equal(got[1:], want)


def test_the_prefix_is_not_copied_per_row_where_nothing_must_be_joined(random):
    """Without a prefix the keys go to SDPA as they are; with one there is one joined copy of keys and of values."""
    q, k, v, prefix_k, prefix_v = (t.requires_grad_() for t in operands(random, 2, 4, 4, 9, 9, 8, 3))
    for size, joined in ((0, 0), (3, 2)):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
            prefix = [p[:, :size] if size else p[:, :0].detach() for p in (prefix_k, prefix_v)]
            prefix_attention(q, k, v, *prefix)
        own = {t.data_ptr() for t in (q, k, v)}
        large = {t.data_ptr() for t in seen if t.shape == (2, 4, 9 + size, 8)} - own
        assert len(large) == joined + (size == 0)  # plus the output where its shape is the same


def test_a_prefix_may_have_a_dtype_of_its_own(random):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 2, 5, 9, 8, 3)
    low = [t.bfloat16() for t in (q, k, v)]
    prefix = [t.float().requires_grad_() for t in (prefix_k, prefix_v)]
    o = prefix_attention(*low, *prefix)
    assert o.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(o.sum(), prefix))


def test_errors_name_the_shapes(random):
    q, k, v, prefix_k, prefix_v = operands(random, 2, 4, 2, 5, 9, 8, 3)
    with pytest.raises(
        ValueError, match=r"prefix_attention: q \(2, 4, 5, 8\), k \(2, 2, 9, 8\), v \(2, 2, 8, 8\), pre"
    ):
        prefix_attention(q, k, v[:, :, :8], prefix_k, prefix_v)
    with pytest.raises(
        ValueError, match=r"prefix_k \(1, 3, 8\), prefix_v \(1, 3, 8\) do not fit; want q \(B, Hq, T, D\)"
    ):
        prefix_attention(q, k, v, prefix_k[:1], prefix_v[:1])
    with pytest.raises(ValueError, match=r"lengths \(3,\) do not fit"):
        prefix_attention(q, k, v, prefix_k, prefix_v, lengths=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"lengths are torch.int32\); want"):
        prefix_attention(q, k, v, prefix_k, prefix_v, lengths=torch.tensor([1, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"Hq 3 is no multiple of Hkv 2"):
        prefix_attention(q[:, :3], k, v, prefix_k, prefix_v)
