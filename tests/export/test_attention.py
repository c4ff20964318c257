"""Every kind of attention that a family's configurations have: the file is torch's, or refused before training."""

from functools import partial

import pytest
import torch

from compressft.errors import UserError
from compressft.evaluation.logits import feed, open_session
from compressft.export.cache import with_cache
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.export.refuse import no_cache, refuse_attention, refuse_model
from compressft.recipe.recipe import parse_recipe
from tests.share import drawn
from tests.tiny import PAIRS, TINY, logits, padded, tiny
from tests.tiny_folder import document

pytestmark = pytest.mark.dear

ONE = {"num_hidden_layers": 1}
MIXED = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
# Of one structure with another, whose export is in other tests: next to these are `test_cache.py`, `test_rotary.py`.
CASES = {
    "roberta": ("roberta", ONE),
    "distilbert": ("distilbert", {"n_layers": 1}),
    "bert, decoder": ("bert", {"architecture": "BertLMHeadModel", "is_decoder": True, **ONE}),
    "roberta, decoder": ("roberta", {"architecture": "RobertaForCausalLM", "is_decoder": True, **ONE}),
    "qwen2, some windows": ("qwen2", MIXED),
    # Norms of queries and keys.
    "qwen3, some windows": ("qwen3", {**MIXED, "architecture": "Qwen3ForCausalLM"}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, **ONE}),
    "llama, both directions": (
        "llama",
        {"is_causal": False, "architecture": "LlamaForTokenClassification", **ONE},
    ),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, unscaled": ("gpt2", {"scale_attn_weights": False, "n_layer": 1}),
    # A bias by relative position.
    "t5, encoder": ("t5", {"architecture": "T5ForTokenClassification", "num_layers": 1}),
}


@pytest.mark.parametrize("name", drawn(1, CASES, ("t5, encoder",)))
def test_the_file_is_torchs_at_every_length(name, tmp_path):
    family, changes = CASES[name]
    model = tiny(family, **changes)
    pad = {**TINY, **PAIRS}[family][1].get("pad_token_id", 0)
    inputs = padded(2, 4)
    inputs["attention_mask"][:] = 1
    language_model = model.get_output_embeddings() is not None
    given = with_cache(model, inputs) if language_model and no_cache(model) is None else inputs
    save(to_graph(fold(model), given), tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    for length in (2, 4, 5, 9, 30):
        batch = padded(3, length, seed=length)
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
        got = torch.from_numpy(session.run(["logits"], feed(session, batch))[0])
        got = got[batch["attention_mask"].bool()] if got.dim() == 3 else got
        torch.testing.assert_close(got, logits(model, batch), atol=2e-5, rtol=1e-4)


RECIPE = parse_recipe(document("x", "y"))
FAMILIES = [pytest.param(*CASES[name], id=name) for name in CASES if not name.startswith("t5")]


@pytest.mark.parametrize(("family", "changes"), [*FAMILIES, *((family, {}) for family in TINY)])
def test_what_exports_is_not_refused(family, changes):
    model = tiny(family, **changes).train()
    refuse_attention(RECIPE, model, padded(2, 6))
    assert model.training


def with_sinks(model):
    attention = model.model.layers[1].self_attn
    attention.forward = partial(attention.forward, s_aux=torch.zeros(4))


def in_chunks(model):
    def hide(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., 3:, :3] = False
        return args, {**kwargs, "attention_mask": mask}

    model.model.layers[1].self_attn.register_forward_pre_hook(hide, with_kwargs=True)


@pytest.mark.parametrize(("change", "reason"), [(with_sinks, "has sinks"), (in_chunks, "has a mask of its own")])
def test_what_the_node_cannot_say_is_refused(change, reason):
    model = tiny("llama")
    change(model)
    with pytest.raises(UserError, match=rf"export: attention of model\.layers\.1 {reason}, for which .* has no form"):
        refuse_attention(RECIPE, model, padded(2, 6))
    refuse_attention(parse_recipe(document("x", "y", export={"enabled": False})), model, padded(2, 6))


def test_a_language_model_that_sees_later_tokens_has_no_cache():
    model = tiny("llama", is_causal=False, **ONE)
    with pytest.raises(UserError, match="this llama sees later tokens"):
        refuse_model(parse_recipe(document("x", "y", task="causal-lm")), model)


def test_a_window_is_the_training_masks(tmp_path):
    """What the check compares with is what training has."""
    batch = padded(2, 9)
    wide, narrow = tiny("mistral", sliding_window=20), tiny("mistral", sliding_window=3)
    for model in (wide, narrow):
        refuse_attention(RECIPE, model, batch)
    assert float((logits(wide, batch) - logits(narrow, batch)).abs().max()) > 0.01
