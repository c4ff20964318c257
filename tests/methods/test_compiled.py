"""torch.compile: every method's training step is one graph, and has eager's loss and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import _dynamo as dynamo

from compressft.methods.fusion import Fusion
from compressft.modules.linear import bare, dense
from compressft.passes.int8 import Int8
from compressft.passes.movement import Movement
from compressft.transform import Context, Transform, trainable
from tests.methods.added import save_adapter
from tests.methods.test_methods import CASES
from tests.share import drawn
from tests.tiny import labelled, logits, tiny

# What dynamo's own tracing of our autograd functions and between two graphs warns of.
pytestmark = [
    pytest.mark.dear,
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
# Features are looked up by a row's own tokens, outside any graph, and no graph holds an LSTM.
SPLIT = {name for name in CASES if "probe" in name}
# Settings that are traced as others are.
ALIKE = {"full, frozen embeddings", "mask, masked head", "supermask", "head importance, frozen"}
NAMES = [name for name in [*CASES, "fusion"] if name not in ALIKE]
# One of each kind of module of ours: behind a norm, in attention, gates, deltas, another attention, a tuner.
KINDS = ("pfeiffer", "prefix", "mask", "diff", "lsh_attention", "peft")


def quiet() -> torch.nn.Module:
    """A tiny BERT of one layer without dropout."""
    return tiny(**QUIET)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Transform]:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = tuple(save_adapter(folder / str(i), quiet, seed=i) for i in (0, 1))
    return {**CASES, "fusion": Fusion(adapters=adapters, dropout=0.0)}


@pytest.fixture(autouse=True)
def forgotten():
    dynamo.reset()
    yield
    dynamo.reset()


def step(transforms, **compiler) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one training step."""
    model, batch, context = quiet(), labelled(4), Context(tuple(transforms))
    for transform in transforms:
        transform.prepare(model, context)
    for transform in transforms:
        transform.after_step(model, 0.5)
    model.train()
    run = torch.compile(model, **compiler) if compiler else model
    torch.manual_seed(0)
    outputs = run(**batch)
    loss = outputs.loss
    for transform in transforms:
        loss = loss + sum(transform.loss(model, batch, outputs, context).values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable(model) if p.grad is not None}


def assert_same(transforms, tolerance: float = 1e-6, **compiler) -> None:
    want, got = step(transforms), step(transforms, **compiler)
    torch.testing.assert_close(got[0], want[0], atol=tolerance, rtol=tolerance)
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient, atol=tolerance, rtol=10 * tolerance, msg=name)


@pytest.mark.parametrize("name", drawn(0, NAMES, KINDS))
def test_one_graph_with_eager_gradients(name, cases):
    assert_same([cases[name]], backend="eager", fullgraph=name not in SPLIT)


@pytest.mark.parametrize("name", drawn(1, KINDS))
def test_one_graph_through_autograds_tracing(name, cases):
    assert_same([cases[name]], backend="aot_eager", fullgraph=True)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
def test_inductor(cases):
    assert_same([cases["pfeiffer"]], 1e-4, backend="inductor", fullgraph=True)


def test_beside_a_pass(cases):
    assert_same([cases["pfeiffer"], Movement(sparsity=0.5, start=0.0, end=0.6)], backend="eager", fullgraph=True)


@pytest.mark.full
def test_beside_int8(cases):
    """It looks at counters and ranges, which no graph holds."""
    assert_same([cases["pfeiffer"], Int8()], backend="eager")


def test_switches_are_seen(cases):
    """The `self` and `base` teachers are the same compiled model with parts of it off."""
    base, batch = quiet(), labelled(4)
    model = quiet()
    for transform in (cases["pfeiffer"], Movement(sparsity=0.5, start=0.0, end=0.4)):
        transform.prepare(model, Context())
        transform.after_step(model, 0.5)
    model.eval()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.adapter.up_bias += 1.0
    run = torch.compile(model, backend="eager", fullgraph=True)
    eager = logits(model, batch)
    assert torch.equal(logits(run, batch), eager)
    for switch in (dense, bare):
        with switch():
            off = logits(run, batch)
            assert torch.equal(off, logits(model, batch))
        assert not torch.equal(off, eager)
    torch.testing.assert_close(off, logits(base, batch))
    assert torch.equal(logits(run, batch), eager)
