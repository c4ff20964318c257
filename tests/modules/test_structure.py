"""Describing a model's modules and putting them into a plain model again gives the same function."""

import json

import pytest
import torch

from compressft.methods.adapter import Adapter
from compressft.modules.gate import ColumnGate
from compressft.modules.linear import CompressedLinear
from compressft.modules.structure import describe, rebuild
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.shrink import resize, shapes
from compressft.transform import Context
from tests.tiny import batch_for, logits, tiny

PRUNE = Structured(heads=0.5, ffn=0.4, align=4, floor_ffn=4, start=0.0, end=0.5)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_round_trip(family, placement, ranges):
    model = tiny(family)
    batch = batch_for(family)
    transforms = [Adapter(placement=placement, size=6), PRUNE, Int8(ranges=ranges)]
    for transform in transforms:
        transform.prepare(model, Context())
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    logits(model.train(), batch)
    model.eval()
    for progress in (0.2, 0.6):
        for transform in transforms:
            transform.after_step(model, progress)
    for transform in transforms:
        transform.finalize(model)
    want = logits(model, batch)
    table = json.loads(json.dumps(describe(model)))

    other = tiny(family, seed=5)
    resize(other, shapes(model))
    rebuild(other, table)
    other.eval()
    assert describe(other) == describe(model)
    assert {n: type(m) for n, m in other.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, batch), want)
    # Loaded models do not learn ranges any more.
    logits(other.train(), {**batch, "input_ids": batch["input_ids"].flip(0)})
    assert torch.equal(logits(other.eval(), batch), want)


def test_plain_models_have_nothing_to_describe():
    assert describe(tiny()) == {}


def test_unsettled_modules_are_refused():
    model = tiny()
    PRUNE.prepare(model, Context())
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.output\.dense: gates or delta are not folded"):
        describe(model)
    linear = CompressedLinear(4, 4)
    linear.gates["structured"] = ColumnGate(4, 1)
    with pytest.raises(ValueError, match="are not folded"):
        describe(torch.nn.Sequential(linear))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown kind 'nf4'"):
        rebuild(tiny(), {"classifier": {"kind": "nf4"}})
