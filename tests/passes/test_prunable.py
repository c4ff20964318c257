"""Columns that may go: what the layer makes up for, and how far the model is seen to move."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from compressft.model.anatomy import anatomy
from compressft.model.shrink import drop_layers
from compressft.passes.shared.prunable import Prunable, Shift, model_losses, skipped
from tests.tiny import TINY, batch_for, logits, tiny


def problem(bias=True, transposed=False):
    """A layer, and inputs with a mean far from 0."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    module = Conv1D(5, 12) if transposed else nn.Linear(12, 5, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(300, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 3.0
    part = Prunable(module, 3, x.t() @ x / len(x), x.mean(0), 1e-9)
    return module, x, part


@pytest.mark.parametrize(("bias", "transposed"), [(True, False), (False, False), (True, True)])
def test_weights_and_bias_are_the_least_squares_solution(bias, transposed):
    module, x, part = problem(bias, transposed)
    want = module(x).detach()
    part.keep([0, 2])
    columns = x[:, [0, 1, 2, 6, 7, 8]]
    inputs = torch.cat([columns, torch.ones(len(x), 1)], 1) if bias else columns
    best = inputs @ torch.linalg.lstsq(inputs.double(), want.double()).solution.float()
    torch.testing.assert_close(module(x), best, atol=2e-2, rtol=1e-3)
    part.keep([0, 1, 2, 3])
    assert torch.equal(module(x), want), "everything kept is everything as it was"


def test_nothing_kept_leaves_the_mean_to_the_bias():
    module, x, part = problem()
    want = module(x).mean(0)
    part.keep([])
    torch.testing.assert_close(module(x), want.expand(300, 5), atol=1e-3, rtol=1e-4)


def shift_of(model, batch):
    return Shift(model, [batch])


@pytest.mark.parametrize("family", TINY)
def test_shift_is_zero_for_the_same_model_and_sees_no_padding(family):
    model, batch = tiny(family), batch_for(family)
    shift = shift_of(model, batch)
    assert shift() == 0.0
    with torch.no_grad():
        anatomy(model).layers[0].part(anatomy(model).family.down).weight.mul_(0.5)
    moved = shift()
    assert moved > 1e-4
    shift.batches[0]["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    assert shift() == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize("family", TINY)
def test_shift_from_a_changed_layer_on_is_the_whole_models(family):
    model, batch = tiny(family), batch_for(family)
    layers = anatomy(model).layers
    second = {name: value[:2] for name, value in batch.items()}
    shift = Shift(model, [batch, second], [layer.module for layer in layers])
    with torch.no_grad():
        layers[1].part(layers[1].family.down).weight.mul_(0.5)
    ran = []
    layers[0].part(layers[0].family.down).register_forward_hook(lambda *_: ran.append(0))
    moved = shift(1)
    assert not ran, "the layer before is not run"
    assert moved > 1e-4 and moved == pytest.approx(shift(), rel=1e-6) and len(ran) == 2
    assert shift(0) == shift(), "all layers are themselves again"


@pytest.mark.parametrize("family", ["bert", "distilbert", "qwen3", "gpt2"])
def test_a_skipped_layer_is_a_dropped_one(family):
    model, dropped, batch = tiny(family), tiny(family), batch_for(family)
    drop_layers(dropped, [1])
    with skipped(anatomy(model).layers[0].module):
        torch.testing.assert_close(logits(model, batch), logits(dropped, batch))
    assert not torch.allclose(logits(model, batch), logits(dropped, batch))


def test_losses_are_measured_at_the_ends_and_never_fall():
    module, x, part = problem()
    want = module(x).detach()
    order, errors = part.removal()
    calls = []

    def shift():
        calls.append(float((module(x) - want).detach().square().mean()))
        return calls[-1]

    losses = model_losses(part, order, errors, [1, 2, 3, 4], shift)
    assert list(losses) == [1, 2, 3, 4] and losses[4] == 0.0 and len(calls) == 3
    assert all(a >= b for a, b in pairwise(losses.values()))
    assert [losses[size] for size in (3, 2, 1)] == pytest.approx(calls), "every size was run here"
    assert torch.equal(module(x), want), "the layer is as it was"
