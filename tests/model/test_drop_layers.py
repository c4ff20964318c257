"""Layers really dropped, in every family: the model is the one that its configuration now describes."""

import pytest
import torch

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.shrink import drop_layers
from tests.tiny import TINY, batch_for, logits, padded, tiny

DEPTH = 4
KEPT = (0, 2, 3)
CAUSAL = ["llama", "mistral", "qwen2", "gpt2"]


def deep(family: str, depth: int = DEPTH, **changes):
    name = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return tiny(family, **{name: depth}, **changes)


def rebuilt(model, family: str):
    """A new model of the present depth with the kept layers' values."""
    own = deep(family, len(KEPT), seed=9)
    own.load_state_dict(model.state_dict())
    return own.eval()


@pytest.mark.parametrize("family", TINY)
def test_equals_a_model_built_of_those_layers(family):
    model, batch = deep(family), batch_for(family)
    sources = [layer.module for layer in anatomy(model).layers]
    whole = logits(model, batch)
    drop_layers(model, KEPT)
    assert [layer.module for layer in anatomy(model).layers] == [sources[i] for i in KEPT]
    assert model.config.num_hidden_layers == len(KEPT)
    got = logits(model, batch)
    assert torch.equal(got, logits(rebuilt(model, family), batch)) and not torch.allclose(got, whole, atol=1e-3)
    hidden = model(**batch, output_hidden_states=True).hidden_states
    assert len(hidden) == len(KEPT) + 1


@pytest.mark.parametrize("family", TINY)
def test_all_layers_kept_changes_nothing(family):
    model, batch = deep(family), batch_for(family)
    want = logits(model, batch)
    drop_layers(model, range(DEPTH))
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize("family", TINY)
def test_saved_and_loaded(family, tmp_path):
    model, batch = deep(family), batch_for(family)
    drop_layers(model, KEPT)
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert loaded.config.num_hidden_layers == len(KEPT) == len(anatomy(loaded).layers)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    # Plain transformers reads the folder too: the configuration says the depth.
    plain = type(model).from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(plain.eval(), batch), logits(model, batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", CAUSAL)
def test_generates_with_a_cache(family):
    model, batch = deep(family), padded(left=True)
    drop_layers(model, KEPT)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, whole = (model.generate(**batch, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, whole)
    assert torch.equal(cached, rebuilt(model, family).generate(**batch, use_cache=True, **settings))
    out = model(**batch, use_cache=True)
    assert len(out.past_key_values) == len(KEPT)


def test_kinds_of_layers_are_kept_too():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = deep("qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=3, max_window_layers=0)
    drop_layers(model, KEPT)
    assert model.config.layer_types == [kinds[i] for i in KEPT]
    batch = padded()
    torch.testing.assert_close(logits(model, batch), logits(rebuilt_like(model), batch))


def rebuilt_like(model):
    new = type(model)._from_config(model.config, attn_implementation=model.config._attn_implementation)
    new.load_state_dict(model.state_dict())
    return new.eval()


@pytest.mark.parametrize("keep", [(), (0, 4), (-1, 2), (2, 1), (1, 1)])
def test_other_indices_are_refused(keep):
    with pytest.raises(UserError, match="ascending indices of 0 to 3, at least one"):
        drop_layers(deep("bert"), keep)
