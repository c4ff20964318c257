"""Task vectors as a method: trained like full, and what ships is the base plus the coded difference."""

import pytest
import torch
from pydantic import ValidationError

from compressft.methods.full import Full
from compressft.methods.task_vector import ORIGIN, CodedTaskVector
from compressft.model.count import count
from compressft.model.saved.codes import Code, decode, encode
from compressft.passes.nf4 import Nf4
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context, trainable
from tests.methods.added import check_autocast
from tests.methods.universal import check_checkpointing, check_folders, check_resume
from tests.passes.sparse import Run, classifier
from tests.tiny import TINY, batch_for, labelled, logits, tiny

METHODS = {
    "exact": CodedTaskVector(),
    "half of it": CodedTaskVector(scaling=0.5),
    "magnitude": CodedTaskVector(encoding="magnitude", density=0.1),
    "low_rank": CodedTaskVector(encoding="low_rank", rank=2),
    "sign": CodedTaskVector(encoding="sign", scaling=0.7),
    "int8": CodedTaskVector(encoding="int8"),
}


def weights(model):
    """Values by plain name; what the method keeps for itself is left out."""
    return {n.replace(".inner.", "."): t.clone() for n, t in model.state_dict().items() if ORIGIN not in n}


@pytest.mark.parametrize("family", TINY)
def test_starts_as_the_base_and_trains_what_full_trains(family):
    batch = batch_for(family)
    for method in (METHODS["exact"], METHODS["sign"]):
        model, full = tiny(family), tiny(family)
        want = logits(model, batch)
        method.prepare(model, Context())
        Full().prepare(full, Context())
        assert torch.equal(logits(model, batch), want)
        assert {name for name, _ in trainable(model)} == {name for name, _ in trainable(full)}


def test_frozen_embeddings_stay():
    method = CodedTaskVector(freeze_embeddings=True, encoding="sign")
    expected = {name for name, _ in tiny().named_parameters() if "embeddings" not in name}
    model = tiny()
    method.prepare(model, Context())
    assert {name for name, _ in trainable(model)} == expected
    run = Run(tiny(), [method], 3)
    before = weights(run.model)
    run.train()
    assert all(torch.equal(t, before[name]) for name, t in weights(run.model).items() if "embeddings" in name)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_ships_the_coded_difference(family, name):
    """Against the formula, with full fine-tuning's own result as theta."""
    method = METHODS[name]
    start, batch = classifier(family)
    theta = Run(classifier(family)[0], [Full()], 5, batch).train()
    run = Run(classifier(family)[0], [method], 5, batch).train()
    before = logits(run.model, batch)
    run.finalize()
    assert torch.equal(logits(run.model, batch), before), "what was evaluated last is what ships"
    assert not hasattr(run.model.base_model, ORIGIN)
    old, trained, got = weights(start), weights(theta.model), weights(run.model)
    assert got.keys() == old.keys()
    backbone = f"{start.base_model_prefix}."
    kinds = {f"{n}.weight": type(m).__name__ for n, m in start.named_modules()}
    for key in old:
        if not key.startswith(backbone):
            want = trained[key]
        else:
            turn = (lambda t: t.t()) if kinds.get(key) == "Conv1D" else (lambda t: t)
            moved = decode(encode(turn(trained[key]) - turn(old[key]), method.code)) * method.scaling
            want = turn(turn(old[key]) + moved)
        torch.testing.assert_close(got[key], want, atol=1e-7, rtol=1e-6, msg=key)
    if name not in ("exact",):
        assert not torch.allclose(before, logits(theta.model, batch), atol=1e-4), "the code has an effect"


def test_nothing_is_held_where_nothing_is_coded():
    model = tiny()
    CodedTaskVector().prepare(model, Context())
    assert model.state_dict().keys() == tiny().state_dict().keys()
    run = Run(tiny(), [CodedTaskVector()], 3).train()
    full = Run(tiny(), [Full()], 3).train()
    assert all(torch.equal(t, weights(full.model)[name]) for name, t in weights(run.model).items())


def test_the_start_costs_no_checkpoint_and_no_device_memory():
    model = tiny()
    METHODS["sign"].prepare(model, Context())
    new = model.state_dict().keys() - tiny().state_dict().keys()
    assert new == {f"bert.{ORIGIN}.coded"}
    assert count(model)["total"] == count(tiny())["total"]
    origin = getattr(model.bert, ORIGIN)
    assert not list(origin.parameters()) and all(t.device.type == "cpu" for t in origin.tensors.values())
    assert not any("classifier" in name for name in origin.tensors)


@pytest.mark.parametrize("name", ["sign", "low_rank"])
def test_resumed_is_the_same(name):
    """At the last step too, where the model has been coded already."""
    check_resume(METHODS[name], steps=6, stops=(3, 6))


def test_settled_without_a_last_step():
    model = tiny()
    method = METHODS["sign"]
    method.prepare(model, Context())
    name = "bert.encoder.layer.0.output.dense.weight"
    old = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        model.get_parameter(name).add_(torch.randn(old.shape, generator=torch.Generator().manual_seed(0)))
    new = model.get_parameter(name).detach().clone()
    method.finalize(model)
    want = old + decode(encode(new - old, Code("sign"))) * 0.7
    assert torch.equal(model.get_parameter(name).detach(), want)


def test_beside_structured_pruning():
    prune = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)
    run = Run(tiny(), [METHODS["int8"], prune], 6).train()
    before = logits(run.model, labelled())
    run.finalize()
    torch.testing.assert_close(logits(run.model, labelled()), before, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_and_autocast():
    check_checkpointing(METHODS["int8"])
    check_autocast(METHODS["int8"], "llama")


def test_refused():
    for wrong in (
        {"encoding": "magnitude"},
        {"rank": 4},
        {"encoding": "low_rank", "rank": 0},
        {"encoding": "float4"},
        {"scaling": 0.0},
        {"encoding": "sign", "density": 0.1},
    ):
        with pytest.raises(ValidationError):
            CodedTaskVector(**wrong)
    assert "take a method that freezes" in conflict([METHODS["sign"], Nf4()])
    assert conflict([METHODS["sign"]]) is None


@pytest.mark.parametrize("name", METHODS)
def test_folders(tmp_path, name):
    """`delta/` holds the codes (a bit or a byte an entry, the largest entries, factors), whatever wrote them."""
    stored, base = check_folders(METHODS[name], tmp_path)
    matrices = {n: t for n, t in base.items() if t.dim() == 2 and "pooler" not in n}
    size = sum(t.nbytes for n, t in stored.items() if n.partition("#")[0] in matrices)
    entries, rows = (sum(f(t) for t in matrices.values()) for f in (torch.numel, len))
    cost = {"sign": entries / 8 + 4 * rows, "int8": entries + 4 * rows, "magnitude": 0.1 * entries * 5.2}
    if name in cost:
        assert size <= 1.03 * cost[name]
    elif name == "low_rank":
        # The factors, and where rounding took something of their product: a bit an entry and some bytes.
        factors = sum(4 * 2 * sum(t.shape) for t in matrices.values())
        assert factors <= size <= factors + 0.35 * entries
    else:
        # Rows of embeddings that no token asked for are the base's.
        assert 0.5 * 4 * entries < size <= 4 * entries
