"""Folding: plain layers again, int8 layers with the integers of training, and the model itself untouched."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compressft.export.fold import WithAdapter, fold
from compressft.export.int8 import Int8Embedding, Int8Linear
from compressft.methods.adapter import Adapter
from compressft.modules.bottleneck import Bottleneck
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear
from compressft.passes.int8 import Int8
from compressft.transform import Context
from tests.export.conftest import kinds
from tests.tiny import batch_for, tiny


@pytest.mark.parametrize("kind", kinds("int8", "pruned", "houlsby", "pfeiffer", "dynamic", "llama", "gpt2"))
def test_nothing_of_training_is_left(exported, kind):
    model = exported(kind).model
    before = {name: (type(m), m.training) for name, m in model.named_modules()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    deployed = fold(model)
    assert not any(isinstance(m, CompressedLinear | CompressedEmbedding) for m in deployed.modules())
    assert not any(p.requires_grad for p in deployed.parameters())
    assert {name: (type(m), m.training) for name, m in model.named_modules()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "compressft"


def test_integers_are_those_of_training(exported):
    """weight = integer * scale, rounded half to even, 127 for the largest pair; zero point and scale of the range."""
    model = exported("int8").model
    deployed = fold(model)
    checked = 0
    for name, layer in deployed.named_modules():
        if isinstance(layer, Int8Linear):
            trained = model.get_submodule(name)
            weight = trained.weight.detach().double()
            pairs = F.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
            scale = torch.stack([pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1)]).amax((0, 2)) / 127
            torch.testing.assert_close(layer.weight_scale.double(), scale, rtol=1e-6, atol=0)
            assert layer.weight.dtype == torch.int8 and layer.weight.shape == weight.shape[::-1]
            restored = layer.weight.double().t() * layer.weight_scale.double()[:, None]
            assert float(((restored - weight).abs() / scale[:, None]).max()) <= 0.5 + 1e-5
            low, high = min(float(trained.quantizer.low), 0.0), max(float(trained.quantizer.high), 0.0)
            assert float(layer.x_scale) == pytest.approx((high - low) / 255, rel=1e-6)
            assert layer.x_zero_point.dtype == torch.uint8
            assert abs(int(layer.x_zero_point) + low / float(layer.x_scale)) <= 0.5 + 1e-4
            assert torch.equal(layer.bias, trained.bias)
            checked += 1
    assert checked == 13


def test_embedding_gives_the_trained_rows(exported):
    model = exported("int8").model
    deployed = fold(model)
    ids = torch.arange(97)[None]
    trained, shipped = (m.bert.embeddings.word_embeddings for m in (model, deployed))
    assert isinstance(shipped, Int8Embedding)
    with torch.no_grad():
        torch.testing.assert_close(shipped(ids), trained.eval()(ids), rtol=1e-6, atol=1e-7)
    assert shipped.weight.dtype == torch.int8 and shipped.scale.shape == (97, 1)


def test_adapters_of_a_projection_follow_its_product():
    """Families without a module after the projection have the adapter in the layer's own slot."""
    model = tiny("llama")
    Adapter(placement="pfeiffer", size=5).prepare(model, Context())
    transform = Int8()
    transform.prepare(model, Context())
    with torch.no_grad():
        model.train()(**batch_for("llama"))
    transform.finalize(model)
    down = fold(model).model.layers[0].mlp.down_proj
    assert isinstance(down, WithAdapter)
    assert isinstance(down.inner, Int8Linear) and isinstance(down.adapter, Bottleneck)


def test_dense_layers_are_plain_again(exported):
    deployed = fold(exported("pruned").model)
    kinds = {type(m) for m in deployed.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert kinds == {nn.Linear, nn.Embedding}
