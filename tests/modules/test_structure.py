"""Describing a model's modules and putting them into a plain model again gives the same function."""

import json
from pathlib import Path

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.shrink import resize, shapes
from compressft.modules import structure
from compressft.modules.gate import ColumnGate
from compressft.modules.int4 import grid_of
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer
from compressft.modules.store import NF4Store
from compressft.modules.structure import describe, rebuild
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.tiny import batch_for, logits, tiny

QUANTISES = {
    "static": Int8(),
    "dynamic": Int8(ranges="dynamic"),
    "learned": Int8(ranges="learned", format="qdq", weight_bits=7, embeddings="int4"),
    "int4": Int4(block=64, symmetric=False, embeddings="int4"),
    "level 4": Int4(accuracy_level=4, embeddings="none"),
}
PRUNE = Structured(heads=0.5, ffn=0.4, align=4, floor_ffn=4, start=0.0, end=0.5)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("quantises", QUANTISES)
def test_round_trip(family, placement, quantises):
    model = tiny(family)
    batch = batch_for(family)
    transforms = [Adapter(placement=placement, size=6), PRUNE, QUANTISES[quantises]]
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
    with pytest.raises(UserError, match="here: classifier: unknown kind 'nf4'"):
        rebuild(tiny(), {"classifier": {"kind": "nf4"}}, "here")


def test_a_fixed_grid_is_rebuilt():
    linear = CompressedLinear(40, 6)
    linear.quantizer = Int4Quantizer()
    linear.quantizer.fix(grid_of(linear.weight, 32, True))
    with torch.no_grad():
        linear.weight.mul_(0.9)
    other = torch.nn.Sequential(torch.nn.Linear(40, 6))
    rebuild(other, json.loads(json.dumps(describe(torch.nn.Sequential(linear)))))
    other.load_state_dict(torch.nn.Sequential(linear).state_dict())
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x), linear(x))


def test_packed_weights_and_unknown_quantizers_are_refused():
    linear = CompressedLinear(8, 8).requires_grad_(False)
    linear.pack(NF4Store(linear.weight))
    with pytest.raises(ValueError, match="still packed"):
        describe(torch.nn.Sequential(linear))
    with pytest.raises(ValueError, match="unknown kind 'int2'"):
        rebuild(torch.nn.Sequential(torch.nn.Linear(4, 4)), {"0": {"kind": "linear", "quantizer": {"kind": "int2"}}})


def test_every_file_of_kinds_is_imported_where_folders_are_read():
    """In a new process nobody else may have imported it."""
    homes = {file.stem for file in Path(structure.__file__).parent.glob("*.py") if "\n@known" in file.read_text()}
    assert len(homes) > 10 and homes - {"linear"} <= set(vars(structure))
