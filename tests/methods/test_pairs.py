"""Methods on encoder-decoders: both stacks and cross-attention take part, and the loss falls."""

import pytest
import torch

from compressft.methods.adapter import Adapter
from compressft.methods.mask import Mask
from compressft.methods.peft import Peft
from compressft.methods.prefix import PrefixTuning
from compressft.model import checkpoint_activations
from compressft.transform import Context, trainable
from tests.tiny import PAIRS, fit, pair_batch, tiny

CASES = {
    "adapter": Adapter(size=4),
    "prefix": PrefixTuning(length=3, reparameterise=False),
    "mask": Mask(first_layer=0),
    "peft": Peft(config={"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}),
}


def loss_of(model):
    with torch.no_grad():
        return float(model.eval()(**pair_batch()).loss)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_learns_in_both_stacks(name, family, recompute):
    model, method = tiny(family), CASES[name]
    method.prepare(model, Context())
    if recompute:
        checkpoint_activations(model)
    names = [n for n, _ in trainable(model)]
    assert all(any(part in n for n in names) for part in ("encoder.", "decoder."))
    if name != "adapter":
        assert any("EncDecAttention" in n or "encoder_attn" in n for n in names), "cross-attention was left out"
    before = loss_of(model)
    fit(model, [method], [pair_batch()], 12, learning_rate=2e-2)
    assert loss_of(model) < before - 0.05
