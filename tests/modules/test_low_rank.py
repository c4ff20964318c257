"""LoRA's and DoRA's own products: PEFT's outputs and gradients, what autograd keeps, and what is left to PEFT."""

from typing import Any

import pytest
import torch
from torch import nn

from compressft.modules.linear import CompressedLinear
from compressft.modules.low_rank import low_rank
from compressft.modules.tuner import PeftTuner, inject, peft_config

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["layer"]}
DORA = {**LORA, "use_dora": True}


def tuned(config, bias=True, rows=24, columns=16) -> tuple[Any, Any]:
    """A linear layer whose tuner has made steps, and the tuner."""
    torch.manual_seed(3)
    root: Any = nn.Module()
    root.layer = CompressedLinear.of(nn.Linear(columns, rows, bias=bias).requires_grad_(False))
    (tuner,) = inject(root, peft_config(config), seed=0).values()
    linear: Any = tuner.base_layer
    PeftTuner(tuner, config, "layer").attach(linear)
    with torch.no_grad():
        for parameter in tuner.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return linear, tuner


def results(product, linear, tuner, autocast, rows=5):
    x = torch.randn(3, rows, linear.in_features, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    counting = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with counting, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = product(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for p in tuner.parameters() if p.requires_grad]
    return y.detach(), torch.autograd.grad(y.float(), (x, *trained), grad), sum(kept.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [LORA, {**LORA, "use_rslora": True}, DORA], ids=["lora", "rslora", "dora"])
def test_outputs_and_gradients_are_pefts(config, bias):
    linear, tuner = tuned(config, bias)
    assert low_rank(tuner, torch.zeros(1, 16)) is not None
    y, gradients, _ = results(linear, linear, tuner, autocast=False)
    want, slopes, _ = results(tuner, linear, tuner, autocast=False)
    assert len(gradients) == (4 if config is DORA else 3)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients, slopes)


# PEFT multiplies by DoRA's factor in fp32 and rounds twice; one pass in bf16 rounds three times.
@pytest.mark.parametrize(("config", "factor"), [(LORA, 1.2), (DORA, 2.2)], ids=["lora", "dora"])
def test_bf16_autocast_is_about_as_close_to_fp32_as_pefts(config, factor):
    linear, tuner = tuned(config, rows=96, columns=64)
    exact, slopes, _ = results(tuner, linear, tuner, autocast=False)
    y, gradients, _ = results(linear, linear, tuner, autocast=True)
    theirs, their_slopes, _ = results(tuner, linear, tuner, autocast=True)
    assert y.dtype == theirs.dtype == torch.bfloat16
    pairs = zip((y, *gradients), (theirs, *their_slopes), (exact, *slopes), strict=True)
    for mine, other, true in pairs:
        assert float((mine - true).abs().mean()) <= factor * float((other - true).abs().mean())


@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_no_more_than_peft(autocast):
    for config in (LORA, DORA):
        linear, tuner = tuned(config, rows=96, columns=64)
        mine = results(linear, linear, tuner, autocast, rows=50)[2]
        theirs = results(tuner, linear, tuner, autocast, rows=50)[2]
        assert mine < theirs if config is DORA else mine <= theirs


def test_dropout_acts_on_the_low_rank_part_alone():
    linear, tuner = tuned({**LORA, "lora_dropout": 0.5})
    linear.train()
    x = torch.randn(40, 16)
    torch.manual_seed(7)
    y = linear(x)
    torch.manual_seed(7)
    torch.testing.assert_close(y, tuner(x))
    assert not torch.equal(y, linear(x))


@pytest.mark.dear
@pytest.mark.parametrize("config", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_to_one_graph(config, autocast):
    linear, tuner = tuned(config)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    y, gradients, _ = results(compiled, linear, tuner, autocast)
    want, slopes, _ = results(linear, linear, tuner, autocast)
    # One rounding of bf16, which depends on the order of sums.
    within: dict[str, Any] = {"atol": 0.05, "rtol": 0.02} if autocast else {}
    torch.testing.assert_close(y, want, **within)
    torch.testing.assert_close(gradients, slopes, **within)


def test_what_is_left_to_peft():
    x = torch.zeros(2, 16)
    assert low_rank(tuned({**LORA, "lora_bias": True})[1], x) is None
    assert low_rank(tuned({"peft_type": "IA3", "target_modules": ["layer"], "feedforward_modules": []})[1], x) is None
    assert low_rank(tuned(LORA)[1], x.bfloat16()) is None
    dropped = tuned({**DORA, "lora_dropout": 0.5})[1]
    assert low_rank(dropped.train(), x) is None and low_rank(dropped.eval(), x) is not None
    off = tuned(LORA)[1]
    off.enable_adapters(False)
    assert low_rank(off, x) is None
