"""Methods on encoder-decoders: both stacks and cross-attention take part, and the loss falls."""

import pytest
import torch
from torch import _dynamo as dynamo

from compressft.methods.adapter import Adapter
from compressft.methods.mask import Mask
from compressft.methods.peft import Peft
from compressft.methods.prefix import PrefixTuning
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.surgery import checkpoint_activations
from compressft.passes.nf4 import Nf4
from compressft.transform import Context, trainable
from tests.methods.added import check_packed, shaken
from tests.share import drawn
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


@pytest.mark.dear
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


def started(name, family, **changes):
    """A model with a method whose own parts matter, as training begins."""
    model = tiny(family, dropout_rate=0.0, dropout=0.0, **changes)
    own = {n for n, _ in model.named_parameters()}
    CASES[name].prepare(model, Context())
    CASES[name].after_step(model, 0.0)
    return shaken(model, *(n for n, _ in trainable(model) if n not in own))


@torch.no_grad()
def logits_of(model):
    return model.eval()(**pair_batch()).logits


@pytest.mark.dear
@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_saved_loaded_and_generating(name, family, tmp_path):
    model, method = tiny(family), CASES[name]
    method.prepare(model, Context())
    fit(model, [method], [pair_batch()], 4, learning_rate=2e-2)
    trained = logits_of(model)
    method.finalize(model)
    want = logits_of(model)
    torch.testing.assert_close(want, trained, atol=1e-5, rtol=1e-5)
    tiny(family).save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    save_compressed(model, None, tmp_path / "model", {})
    save_delta(model, None, base_tensors(base), tmp_path / "delta", {"model": base})
    inputs = {k: v for k, v in pair_batch().items() if k != "labels"}
    for again in (load_compressed(tmp_path / "model"), load_delta(tmp_path / "delta")):
        assert torch.equal(logits_of(again), want)
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        cached, plain = (again.generate(**inputs, use_cache=on, **settings) for on in (True, False))
        assert torch.equal(cached, plain)


@pytest.mark.dear
@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_on_packed_weights(name, family):
    """U7, on both stacks: what is trained on NF4 is what ships on the unpacked weights."""
    model, transforms = tiny(family), [CASES[name], Nf4()]
    for one in transforms:
        one.prepare(model, Context(transforms))
    check_packed(model)
    before = loss_of(model)
    fit(model, transforms, [pair_batch()], 12, learning_rate=2e-2)
    assert loss_of(model) < before - 0.03
    want = logits_of(model)
    for one in transforms:
        one.finalize(model)
    torch.testing.assert_close(logits_of(model), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_bf16(name, family):
    model = started(name, family)
    want = logits_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits_of(model)
        loss = model.train()(**pair_batch()).loss
    assert (got.float() - want).norm() < 0.05 * want.norm()
    loss.backward()
    for n, tensor in trainable(model):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all(), n


@pytest.mark.dear
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", drawn(1, PAIRS))
@pytest.mark.parametrize("name", drawn(1, CASES))
def test_compiled(name, family):
    """One graph, with eager's loss and gradients."""
    dynamo.reset()
    found = []
    for compiled in (False, True):
        model = started(name, family, num_layers=1, encoder_layers=1, decoder_layers=1).train()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        loss = run(**pair_batch()).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in trainable(model) if p.grad is not None}))
    dynamo.reset()
    assert found[0][1]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
