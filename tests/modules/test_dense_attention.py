"""Attention that writes its scores down: SDPA's results and gradients, and taken only where it pays."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compressft.modules import dense_attention
from compressft.modules.dense_attention import attend

B, H, T, D = 2, 4, 7, 8


def inputs(dtype=torch.float32, kv_heads=H, keys=T):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, kv_heads, keys, D), (B, kv_heads, keys, D))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def layer(groups=1, causal=False):
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = groups, causal
    return module


def padding():
    mask = torch.ones(B, 1, T, T, dtype=torch.bool)
    mask[0, :, :, 5:] = False
    mask[1, :, :, :2] = False
    return mask


CASES = {
    "plain": (1, False, lambda: None, {}),
    "padding": (1, False, padding, {"scaling": 0.3}),
    "causal": (1, True, lambda: None, {}),
    "causal by argument": (1, False, lambda: None, {"is_causal": True}),
    "grouped": (2, True, lambda: padding() & torch.ones(T, T, dtype=torch.bool).tril() | torch.eye(T).bool(), {}),
    "added": (1, False, lambda: torch.randn(B, H, T, T, generator=torch.Generator().manual_seed(1)), {}),
    "by position": (1, False, padding, {"position_bias": torch.linspace(-1, 1, H * T * T).view(1, H, T, T)}),
    "by position, causal": (
        1,
        True,
        lambda: None,
        {"position_bias": torch.linspace(-1, 1, H * T * T).view(1, H, T, T)},
    ),
}


def both(case, dtype, keys=T):
    groups, causal, mask, arguments = CASES[case]
    found = []

    def dense(module, *tensors, **options):
        return dense_attention._dense(module, dense_attention.Call(*tensors, options)), None

    for function in (sdpa_attention_forward, dense):
        q, k, v = inputs(dtype, H // groups, keys)
        out, weights = function(layer(groups, causal), q, k, v, mask(), **arguments)
        assert weights is None and out.is_contiguous()
        out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype))
        found.append((out, q.grad, k.grad, v.grad))
    return zip(*found, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_sdpas(case):
    for want, got in both(case, torch.float32):
        assert want.shape == got.shape
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["padding", "causal", "grouped"])
def test_bf16_rounds_no_more_than_sdpa(case):
    exact = [got for _, got in both(case, torch.float64)]
    for reference, (want, got) in zip(exact, both(case, torch.bfloat16), strict=True):
        assert want.dtype == got.dtype == torch.bfloat16
        errors = [(x.double() - reference).abs().max() for x in (got, want)]
        assert errors[0] <= 1.5 * errors[1] + 1e-3


def test_empty_places_behind_the_queries_are_not_seen():
    for want, got in both("causal", torch.float32, keys=T + 3):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_dropout_leaves_shares_out():
    """Values that are the unit vectors: what comes out are the shares."""
    torch.manual_seed(0)
    q, k, _ = inputs()
    v = torch.eye(T).expand(B, H, T, T)
    module = layer()
    whole = attend(module, q, k, v, padding())[0]
    drawn = torch.stack([attend(module, q, k, v, padding(), dropout=0.25)[0].detach() for _ in range(600)])
    kept = drawn != 0
    torch.testing.assert_close(drawn, torch.where(kept, whole / 0.75, 0.0).expand_as(drawn))
    seen = whole > 0
    assert abs(kept[:, seen].double().mean() - 0.75) < 0.01
    assert not kept[:, ~seen].any()


def test_fp16_autocast_and_bf16_autocast_compute_in_their_type():
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = inputs()
        with torch.autocast("cpu", dtype=dtype):
            out = dense_attention._dense(layer(), dense_attention.Call(q, k, v, None, {}))
        assert out.dtype == torch.float32
        want = sdpa_attention_forward(layer(), q, k, v, None)[0]
        torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
        assert not torch.equal(out, want)


def test_taken_only_where_it_pays(monkeypatch):
    taken = []
    monkeypatch.setattr(dense_attention, "_dense", lambda *a, **k: taken.append(1))

    def takes(dtype=torch.bfloat16, **arguments):
        taken.clear()
        q, k, v = inputs(dtype)
        attend(layer(), q, k, v, None, **arguments)
        return bool(taken)

    assert takes(dropout=0.1) and takes(torch.float32, dropout=0.1) and takes()
    assert not takes(torch.float32)
    with torch.no_grad():
        assert not takes() and takes(dropout=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert takes(torch.float32)
    monkeypatch.setattr(dense_attention, "MOST_SCORES", B * H * T * T - 1)
    assert not takes() and takes(dropout=0.1)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not takes(dropout=0.1)
    monkeypatch.undo()
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    assert not dense_attention._pays(elsewhere, elsewhere, dropout=0.1)


def test_keeps_no_more_than_sdpa_for_the_backward_pass():
    for dtype in (torch.float32, torch.bfloat16):
        kept = []
        for function in (sdpa_attention_forward, attend):
            q, k, v = inputs(dtype)
            found = {}

            def pack(tensor, found=found):
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                function(layer(), q, k, v, padding(), dropout=0.1)
            kept.append(sum(found.values()))
        assert kept[1] <= kept[0], (dtype, kept)
