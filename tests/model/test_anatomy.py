"""Anatomy: every family's row leads to the parts that the model really has, in their real shapes."""

from functools import partial

import pytest
import torch
import transformers
from torch import nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy, family_of, linear_shape
from compressft.model.shrink import drop_layers, shrink
from compressft.model.surgery import compress_linear
from compressft.modules.families import FAMILIES
from tests.tiny import PAIRS, SHAPE, TINY, batch_for, logits, pair_batch, random_keep, tiny


def test_every_family_has_a_tiny_model():
    assert set(TINY) | set(PAIRS) == set(FAMILIES)


@pytest.mark.parametrize("family", TINY)
def test_shapes_are_the_configurations(family):
    layers = anatomy(tiny(family)).layers
    assert len(layers) == 2
    for index, layer in enumerate(layers):
        assert (layer.index, layer.heads, layer.kv_heads, layer.head_dim, layer.ffn) == (index, *SHAPE[family])


@pytest.mark.parametrize("family", TINY)
def test_paths_lead_to_the_right_modules(family):
    model = tiny(family)
    parts = anatomy(model)
    heads, kv_heads, dim, ffn = SHAPE[family]
    for layer in parts.layers:
        assert model.get_submodule(layer.name) is layer.module
        widths = {path: linear_shape(layer.part(path)) for path in layer.linears}
        row = layer.family
        expected = {row.o: (heads * dim, 32), row.down: (ffn, 32)} | dict.fromkeys(row.up, (32, ffn))
        if row.fused_qkv:
            expected[row.fused_qkv] = (32, 3 * heads * dim)
        else:
            expected |= {row.q: (32, heads * dim), row.k: (32, kv_heads * dim), row.v: (32, kv_heads * dim)}
        assert widths == expected
        # Nothing that multiplies a matrix is left out.
        matrices = {name for name, parameter in layer.module.named_parameters() if parameter.dim() == 2}
        assert matrices == {f"{path}.weight" for path in layer.linears}
        if row.ffn_norm is not None:
            assert isinstance(layer.part(row.ffn_norm), nn.LayerNorm)
    for path in parts.embedding_paths:
        assert any(isinstance(m, nn.Embedding) for m in model.get_submodule(path).modules())
    tables = {name for name, module in parts.backbone.named_modules() if isinstance(module, nn.Embedding)}
    assert tables == set(parts.family.embedding_tables)


@pytest.mark.parametrize("family", TINY)
def test_outputs_before_the_residual_add(family):
    """Zeroing `attention_out` and `ffn_out` of all layers leaves what the embeddings (and norms) alone give."""
    model = tiny(family)
    parts = anatomy(model)
    calls = []
    for layer in parts.layers:
        for path in (layer.family.attention_out, layer.family.ffn_out):
            layer.part(path).register_forward_hook(lambda module, args, out: calls.append(1) or torch.zeros_like(out))
        norm = layer.family.ffn_norm
        if norm is None:
            # Pre-norm: with both branches gone a layer is the identity.
            layer.module.register_forward_hook(_is_identity)
        else:
            (first,) = (m for n, m in layer.module.named_modules() if isinstance(m, nn.LayerNorm) and n != norm)
            layer.part(norm).register_forward_pre_hook(partial(_is_output_of, first))
    logits(model, batch_for(family))
    assert len(calls) == 4


def _is_identity(module, args, out):
    out = out[0] if isinstance(out, tuple) else out
    assert torch.equal(out, args[0])


def _is_output_of(first, module, args):
    # Post-norm: the FFN's norm sees the attention norm's output alone.
    normalised = (args[0] - first.bias) / first.weight
    assert normalised.mean(-1).abs().max() < 1e-4 and (normalised.std(-1, correction=0) - 1).abs().max() < 1e-3


def test_bare_backbone_has_no_prefix():
    parts = anatomy(tiny("bert", architecture="BertModel"))
    assert parts.prefix == "" and parts.layers[1].name == "encoder.layer.1"
    assert parts.path("embeddings") == "embeddings"


def test_shapes_follow_pruning_and_replacement():
    model = tiny("llama")
    keep = random_keep(model)
    for layer in anatomy(model).layers:
        compress_linear(model, f"{layer.name}.{layer.family.down}")
    shrink(model, keep)
    for layer, kept in zip(anatomy(model).layers, keep, strict=True):
        assert (layer.kv_heads, layer.heads, layer.ffn) == (
            len(kept["heads"]),
            2 * len(kept["heads"]),
            len(kept["ffn"]),
        )


def test_unknown_family_lists_the_known_ones():
    config = transformers.AutoConfig.for_model(
        "albert", vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(UserError, match="'albert' is not known") as caught:
        anatomy(transformers.AlbertModel(config))
    assert all(family in str(caught.value) for family in FAMILIES)
    with pytest.raises(UserError, match="known families"):
        family_of(nn.Linear(2, 2))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", PAIRS)
def test_encoder_decoders(family, gated):
    """Both stacks, nothing that multiplies a matrix left out, and FFN neurons that can go."""
    changes = {"feed_forward_proj": "gated-gelu"} if gated and family == "t5" else {}
    model = tiny(family, **changes)
    layers = anatomy(model).layers
    assert [(layer.index, layer.heads, layer.head_dim, layer.ffn) for layer in layers] == [
        (index, 4, 8, 64) for index in (0, 1, 0, 1)
    ]
    for layer in layers:
        assert model.get_submodule(layer.name) is layer.module
        matrices = {n for n, p in layer.module.named_parameters() if p.dim() == 2 and "relative" not in n}
        assert matrices == {f"{path}.weight" for path in layer.linears}
        assert bool(layer.family.cross) == ("decoder" in layer.name)
        for path in (layer.family.attention_out, layer.family.ffn_out, layer.family.cross_out, *layer.family.norms):
            assert path is None or layer.part(path) is not None
    batch = pair_batch()
    with torch.no_grad():
        before = model(**batch).logits
        keep = torch.arange(0, 64, 2)
        for layer in layers:
            layer.part(layer.family.down).weight[:, 1::2] = 0
        want = model(**batch).logits
        shrink(model, [{"ffn": keep} for _ in layers])
        assert not torch.allclose(before, want, atol=1e-3)
        torch.testing.assert_close(model(**batch).logits, want)
    with pytest.raises(UserError, match="encoder-decoder"):
        drop_layers(model, [0])


def test_heads_of_t5_stay():
    model = tiny("t5")
    with pytest.raises(UserError, match="position bias"):
        shrink(model, [{"heads": torch.arange(3)} for _ in range(4)])


def test_another_familys_configuration_is_refused():
    """transformers loads a GPT-2's folder as a BERT, with random weights."""
    model = tiny("bert")
    model.config = tiny("gpt2").config
    with pytest.raises(UserError, match="a BertForSequenceClassification of the configuration of a 'gpt2'"):
        anatomy(model)
