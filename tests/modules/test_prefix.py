"""Attention with a prefix: the formula under every mask, its identities, the kernel's route, and the shifted table."""

import pytest
import torch
from torch import nn

from compressft.modules import prefix as module
from compressft.modules.attention import attention, causal_bias, prefix_of
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import bare
from compressft.modules.prefix import Prefix, ReparameterisedPrefix, Table, right_padding

B, HQ, HKV, T, D, P = 3, 4, 2, 7, 5, 3


def seeded(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(causal=False, length=P, heads=HKV):
    """An attention module as transformers' are seen by their attention function."""
    new = nn.Module()
    new.is_causal, new.num_key_value_groups = causal, HQ // heads
    new.prefix = Prefix.of(seeded(heads, length, D, seed=1), seeded(heads, length, D, seed=2))
    return new.eval()


def operands(queries=T, keys=T, heads=HKV):
    return seeded(B, HQ, queries, D, seed=3), seeded(B, heads, keys, D, seed=4), seeded(B, heads, keys, D, seed=5)


def formula(new, q, k, v, seen, scaling=D**-0.5, bias=None):
    """softmax(q [P; k]^T * scaling) [P; v] written out in fp64; `seen` (B, T, S) says which own keys count."""
    key, value = (p.detach().double() for p in new.prefix())
    groups = q.shape[1] // k.shape[1]
    keys, values = (
        torch.cat([p.expand(len(q), -1, -1, -1), t.double()], 2).repeat_interleave(groups, 1)
        for p, t in ((key, k), (value, v))
    )
    scores = torch.einsum("bhtd,bhsd->bhts", q.double(), keys) * scaling
    if bias is not None:
        scores[..., key.shape[1] :] += bias
    weights = scores.exp()
    weights[..., key.shape[1] :] *= seen[:, None]
    return torch.einsum("bhts,bhsd->bthd", weights / weights.sum(-1, keepdim=True), values).float()


def close(got, want, limit=1e-6):
    torch.testing.assert_close(got, want, atol=limit, rtol=1e-5)


LENGTHS = torch.tensor([7, 4, 1])
RIGHT = torch.arange(T) < LENGTHS[:, None]
# Who sees whom, (B, T, T).
SEEN = {
    "everyone": torch.ones(B, T, T).bool(),
    "right": RIGHT[:, None].expand(B, T, T),
    "left": RIGHT.flip(1)[:, None].expand(B, T, T),
    "causal": torch.ones(B, T, T).bool().tril(),
    "causal, right": RIGHT[:, None].expand(B, T, T).tril(),
    "causal, left": RIGHT.flip(1)[:, None].expand(B, T, T).tril(),
    "window": torch.ones(B, T, T).bool().tril().triu(-2),
    "holes": torch.arange(T * T * B).view(B, T, T) % 3 > 0,
}


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("name", SEEN)
def test_every_mask_follows_the_formula(name, kind, routed, monkeypatch):
    """On the kernel's route (its plain twin, here) as well: masks that it cannot express must not reach it."""
    monkeypatch.setattr(module, "kernel_runs", lambda query: routed)
    new, seen = place("causal" in name or name == "window"), SEEN[name]
    mask = seen[:, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    got, weights = attention(new, *operands(), mask)
    assert weights is None and got.shape == (B, T, HQ, D) and got.is_contiguous()
    close(got, formula(new, *operands(), seen))


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, T])
def test_without_a_mask(causal, queries, routed, monkeypatch):
    monkeypatch.setattr(module, "kernel_runs", lambda query: routed)
    new, (q, k, v) = place(causal), operands(queries)
    seen = SEEN["causal" if causal and queries > 1 else "everyone"][:, :queries]
    close(attention(new, q, k, v, None)[0], formula(new, q, k, v, seen))
    # What the model says goes before what the module is.
    seen = SEEN["everyone"][:, :queries] if causal else SEEN["causal"][:, :queries] if queries > 1 else seen
    close(attention(new, q, k, v, None, is_causal=not causal)[0], formula(new, q, k, v, seen))


@pytest.mark.parametrize("routed", [False, True])
def test_static_cache(routed, monkeypatch):
    """Its first forward comes without a mask and with empty places behind the queries' own keys."""
    monkeypatch.setattr(module, "kernel_runs", lambda query: routed)
    new, (q, k, v) = place(True), operands(4)
    seen = torch.ones(B, 4, T).bool().tril()
    close(attention(new, q, k, v, None)[0], formula(new, q, k, v, seen))
    # Later ones have a mask that ends before the last key.
    later = (torch.arange(T) < 5).expand(B, 1, T)
    close(attention(new, q[:, :, :1], k, v, later[:, None])[0], formula(new, q[:, :, :1], k, v, later))


@pytest.mark.parametrize("routed", [False, True])
def test_more_keys_than_queries(routed, monkeypatch):
    monkeypatch.setattr(module, "kernel_runs", lambda query: routed)
    new, (q, k, v) = place(True), operands(3)
    seen = SEEN["causal, right"][:, -3:]
    close(attention(new, q, k, v, seen[:, None])[0], formula(new, q, k, v, seen))


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_heads_and_scaling(heads, routed, monkeypatch):
    monkeypatch.setattr(module, "kernel_runs", lambda query: routed)
    new, tensors = place(heads=heads), operands(heads=heads)
    got = attention(new, *tensors, SEEN["right"][:, None], scaling=0.7)[0]
    close(got, formula(new, *tensors, SEEN["right"], 0.7))
    assert not torch.allclose(got, formula(new, *tensors, SEEN["right"]), atol=1e-2)


def test_a_position_bias_is_for_the_rows_own_keys():
    new, bias = place(), seeded(1, HQ, T, T, seed=6)
    got = attention(new, *operands(), SEEN["left"][:, None], position_bias=bias, scaling=1.0)[0]
    close(got, formula(new, *operands(), SEEN["left"], 1.0, bias.double()), 1e-5)


# Identities.


def partition(q, k):
    return (torch.einsum("bhtd,bhsd->bths", q, k.repeat_interleave(HQ // HKV, 1)) * D**-0.5).exp().sum(-1, keepdim=True)


def test_a_prefix_of_zeros_is_not_the_identity():
    """Zero keys weigh exp(0) each, zero values add nothing: exactly Z / (Z + P) of the attention without them."""
    new, (q, k, v) = place(), operands()
    with bare():
        base = attention(new, q, k, v, None)[0]
    nn.init.zeros_(new.prefix.key)
    nn.init.zeros_(new.prefix.value)
    z = partition(q, k)
    got = attention(new, q, k, v, None)[0]
    close(got, base * z / (z + P))
    assert not torch.allclose(got, base, atol=1e-2)


def test_log_sum_exp_merge():
    """Attention over prefix and own keys apart, merged by their log-sum-exp, is attention over both."""
    new, (q, k, v) = place(), operands()
    with bare():
        own = attention(new, q, k, v, None)[0]
    key, value = (p.detach().expand(B, -1, -1, -1) for p in new.prefix())
    with bare():
        front = attention(new, q, key, value, None)[0]
    share = torch.sigmoid(partition(q, key).log() - partition(q, k).log())
    close(attention(new, q, k, v, None)[0], share * front + (1 - share) * own)


def test_a_prefix_that_is_never_looked_at_is_the_identity():
    new, (q, k, v) = place(), operands()
    nn.init.constant_(new.prefix.key, -1e4)
    with bare():
        base = attention(new, q.abs(), k, v, None)[0]
    close(attention(new, q.abs(), k, v, None)[0], base)


def test_gradients_are_those_of_the_formula():
    new, tensors = place(True), [t.requires_grad_() for t in operands()]
    leaves = [*tensors, new.prefix.key, new.prefix.value]
    direction = seeded(B, T, HQ, D, seed=9)
    got = torch.autograd.grad((attention(new, *tensors, None)[0] * direction).sum(), leaves)
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    twin = place(True)
    twin.prefix.forward = lambda: (copies[3], copies[4])
    keys, values = (
        torch.cat([p.expand(B, -1, -1, -1), t], 2).repeat_interleave(2, 1)
        for p, t in ((copies[3], copies[1]), (copies[4], copies[2]))
    )
    scores = torch.einsum("bhtd,bhsd->bhts", copies[0], keys) * D**-0.5
    seen = torch.cat([torch.ones(B, T, P).bool(), SEEN["causal"]], -1)[:, None]
    o = torch.einsum("bhts,bhsd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
    want = torch.autograd.grad((o * direction).sum(), copies)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, atol=1e-5, rtol=1e-4)


# What decides the route.


def test_right_padding_is_told_from_everything_else():
    for name, causal in (("right", False), ("everyone", False), ("causal, right", True), ("causal", True)):
        mask = SEEN[name][:, None].contiguous()
        want = LENGTHS if "right" in name else torch.full((B,), T)
        assert torch.equal(right_padding(mask, causal), want), name
        assert right_padding(mask.clone(), not causal) is None or name == "everyone", name
    for name in ("left", "causal, left", "window", "holes"):
        assert right_padding(SEEN[name][:, None].contiguous(), name != "left") is None, name
    assert right_padding(SEEN["right"][:, None].float(), False) is None
    assert right_padding(SEEN["right"][:, None].expand(B, HQ, T, T), False) is None


def test_a_changed_mask_is_read_again():
    mask = SEEN["right"][:, None].clone()
    assert torch.equal(right_padding(mask, False), LENGTHS)
    mask[0, 0, :, -1] = False
    assert torch.equal(right_padding(mask, False), LENGTHS - torch.tensor([1, 0, 0]))
    mask[0, 0, 2, 0] = False
    assert right_padding(mask, False) is None


def test_the_kernel_is_taken_where_it_can_be(monkeypatch):
    monkeypatch.setattr(module, "kernel_runs", lambda query: True)
    calls = []
    kernel = module.prefix_attention
    monkeypatch.setattr(module, "prefix_attention", lambda *a, **k: calls.append(k) or kernel(*a, **k))
    new = place(True)
    for mask in (None, SEEN["causal, right"][:, None], SEEN["causal, left"][:, None]):
        attention(new, *operands(), mask)
    assert [c["causal"] for c in calls] == [True, True]
    assert calls[0]["lengths"] is None and torch.equal(calls[1]["lengths"], LENGTHS)
    attention(new, *operands(), None, dropout=0.1)
    new.prefix.dropout = 0.1
    attention(new.train(), *operands(), None)
    assert len(calls) == 2


def test_one_mask_for_all_rows(monkeypatch):
    monkeypatch.setattr(module, "kernel_runs", lambda query: True)
    new, seen = place(), SEEN["right"][1:2]
    close(attention(new, *operands(), seen[:, None])[0], formula(new, *operands(), seen.expand(B, T, T)))


def test_a_paged_cache_is_refused():
    with pytest.raises(ValueError, match="prefix: attention over a paged cache does not know it"):
        attention(place(), *operands(), None, cache=object())


def test_bare_is_without_it():
    new = place()
    with bare():
        got = attention(new, *operands(), None)[0]
    del new.prefix
    assert prefix_of(new) is None and torch.equal(got, attention(new, *operands(), None)[0])


# The modules.


def test_dropout_acts_in_training_alone_and_differs_between_rows():
    new = place()
    new.prefix.dropout = 0.5
    want = attention(new, *operands(), None)[0]
    assert torch.equal(attention(new, *operands(), None)[0], want)
    torch.manual_seed(0)
    key, _ = new.train().prefix.joined(*operands()[1:])
    front = key[:, :, :P]
    scaled = 2.0 * new.prefix.key.detach().expand_as(front)
    assert ((front == 0) | torch.isclose(front, scaled)).all() and 0 < (front == 0).float().mean() < 1
    assert not torch.equal(front[0], front[1]) and torch.equal(key[:, :, P:], operands()[1])


def test_reparameterisation():
    """tanh(E W1^T + b1) W2^T + b2, keys before values, head by head; settled it gives the same numbers."""
    generator = torch.Generator().manual_seed(3)
    table = Table(P, 6, 4, generator)
    front = ReparameterisedPrefix(HKV, D, table, generator)
    rows = torch.tanh(table.table @ table.weight.t() + table.bias) @ front.weight.t() + front.bias
    key, value = rows.view(P, 2, HKV, D).permute(1, 2, 0, 3)
    close(front()[0], key)
    close(front()[1], value)
    settled = front.settled()
    assert torch.equal(settled.key, front()[0]) and torch.equal(settled.value, front()[1])
    assert [n for n, _ in front.named_parameters()] == ["weight", "bias"]
    for parameter, inputs in ((table.weight, 6), (table.bias, 6), (front.weight, 4), (front.bias, 4)):
        assert 0.5 * inputs**-0.5 < parameter.abs().max() <= inputs**-0.5
    with pytest.raises(ValueError, match="prefix: is still reparameterised"):
        front.describe()


def test_keys_are_computed_in_fp32_under_autocast():
    generator = torch.Generator().manual_seed(3)
    front = ReparameterisedPrefix(HKV, D, Table(P, 6, 4, generator), generator)
    want = front()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(g, w) for g, w in zip(front(), want, strict=True))


def test_heads_that_stay():
    new = Prefix.of(seeded(4, P, D), seeded(4, P, D, seed=1)).requires_grad_(False)
    before = new.key.clone(), new.value.clone()
    new.keep(torch.tensor([1, 3]))
    assert torch.equal(new.key, before[0][[1, 3]]) and torch.equal(new.value, before[1][[1, 3]])
    assert not new.key.requires_grad and new.describe() == {"heads": 2, "length": P, "size": D}


def test_causal_bias_is_aligned_with_the_last_key():
    bias = causal_bias(torch.empty(1, 1, 2, 8), 4, 3)
    seen = (bias == 0)[0, 0].tolist()
    assert bias.shape == (1, 1, 2, 7) and seen == [[True] * 6 + [False], [True] * 7]


def test_a_table_looked_up_further_down():
    plain = nn.Embedding(9, 4, padding_idx=1)
    table = CompressedEmbedding.of(plain, bits=None)
    ids = torch.tensor([[0, 2, 5]])
    assert torch.equal(table(ids), plain(ids))
    table.first = 3
    assert torch.equal(table(ids), plain(ids + 3)) and table.weight is plain.weight
    with bare():
        assert torch.equal(table(ids), plain(ids))
    again = CompressedEmbedding.rebuild(nn.Embedding.from_pretrained(plain.weight), table.describe())
    assert torch.equal(again(ids), plain(ids + 3))
    eight = CompressedEmbedding.of(again, 8)
    rounded = eight(ids)
    assert not torch.equal(rounded, plain(ids + 3)) and torch.allclose(rounded, plain(ids + 3), atol=0.02)
    for one, want in ((table, plain(ids + 3)), (eight, rounded)):
        one.fold()
        assert one.first == 0 and one.weight.shape == (6, 4) and torch.equal(one(ids), want)
    assert type(table.restore()) is nn.Embedding and torch.equal(table.restore()(ids), plain(ids + 3))
