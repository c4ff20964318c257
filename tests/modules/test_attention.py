"""The registered attention: equal to sdpa and eager, with padding and grouped queries, and with a cache."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from compressft.modules.attention import EXPORT, TRAINING, padding_mask, register
from tests.tiny import logits, padded, tiny


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
def test_equals_transformers(family, other, left):
    batch = padded(left=left)
    want = logits(tiny(family, attention=other), batch)
    model = tiny(family)
    assert model.config._attn_implementation == TRAINING
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_padding_has_no_influence(family):
    model, batch = tiny(family), padded()
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 42)}
    torch.testing.assert_close(logits(model, changed), logits(model, batch), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("left", [False, True])
def test_cached_generation_equals_the_full_forward(family, left):
    model = tiny(family)
    batch = padded(left=True) if left else {k: v[:1] for k, v in padded().items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cache, steps = None, []
    for end in range(4, ids.shape[1] + 1):
        start = 0 if cache is None else end - 1
        out = model(
            input_ids=ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    got = torch.cat(steps, 1)
    torch.testing.assert_close(got[mask.bool()], full[mask.bool()], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generate_follows_the_argmax_of_the_full_forward():
    model = tiny("llama")
    batch = padded(left=True)
    out = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 5, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    full = model(input_ids=out, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(full[:, -6:-1].argmax(-1), out[:, -5:])


def test_registering_twice_changes_nothing():
    register()
    before = [AttentionInterface()[name] for name in (TRAINING, EXPORT)]
    register()
    assert [AttentionInterface()[name] for name in (TRAINING, EXPORT)] == before
    assert AttentionMaskInterface()[EXPORT] is padding_mask


def test_export_mask_is_the_padding_mask():
    mask = padded()["attention_mask"]
    out = padding_mask(attention_mask=mask, batch_size=4)
    assert out.dtype is torch.int32 and torch.equal(out.long(), mask)
    assert padding_mask() is None
