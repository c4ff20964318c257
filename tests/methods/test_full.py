"""Full fine-tuning: every parameter, or every parameter but the embeddings'."""

import pytest

from compressft.methods.full import Full
from compressft.model.surgery import freeze
from compressft.transform import Context
from tests.tiny import tiny


@pytest.mark.parametrize("frozen", [False, True])
def test_trainable_set(check_training, frozen):
    model = tiny()
    freeze(model)
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if not frozen or not name.startswith("bert.embeddings.")}
    assert len(names - expected) == (5 if frozen else 0)
    check_training(model, Full(freeze_embeddings=frozen), expected)


@pytest.mark.parametrize(("family", "prefix"), [("llama", "model.embed_tokens."), ("gpt2", "transformer.w")])
def test_frozen_embeddings_of_decoders(family, prefix):
    model = tiny(family)
    Full(freeze_embeddings=True).prepare(model, Context())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(prefix))
