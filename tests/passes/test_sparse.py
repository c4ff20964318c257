"""What every pass on single weights promises: the same zeros after settling, saving, folding and resuming."""

import copy
import itertools

import pytest
import torch

from compressft.errors import UserError
from compressft.export.fold import fold
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.probe import Probe
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.attention import TRAINING
from compressft.modules.linear import CompressedLinear
from compressft.passes import PASSES
from compressft.passes.block import Block
from compressft.passes.int8 import Int8
from compressft.passes.l0 import L0
from compressft.passes.magnitude import Magnitude
from compressft.passes.movement import Movement
from compressft.passes.n_m import NM
from compressft.passes.shared.select import LINEARS
from compressft.passes.sparsegpt import SparseGPT
from compressft.passes.structured import Structured
from compressft.passes.wanda import Wanda
from compressft.recipe.conflict import conflict
from compressft.transform import Context, Resource
from tests.passes.sparse import Run, classifier, gated, linears, nonzero, sparsity, weight
from tests.settings import FAST, made
from tests.share import drawn
from tests.tiny import TINY, labelled, logits, tiny


def on_single_weights(one):
    return any(claim.resource is Resource.SINGLE_WEIGHTS for claim in one.takes())


ROWS = {name: one for name in PASSES if on_single_weights(one := made(name))}
VARIANTS = {
    "magnitude-layer": Magnitude(sparsity=0.6, scope="layer", updates=2, **FAST),
    "movement-soft": Movement(variant="soft", penalty=300.0, learning_rate=1.0, threshold=0.3, **FAST),
    "block-tiles": Block(sparsity=0.6, tile=6, ffn="tiles", scope="layer", **FAST),
    "n_m-1:4": NM(n=1, m=4, schedule="constant", **FAST),
    "wanda-2:4": Wanda(pattern="2:4"),
    "sparsegpt-2:4": SparseGPT(pattern="2:4"),
}
PASS = {**ROWS, **VARIANTS}
STEPS = 6


@pytest.mark.parametrize("name", [*ROWS, *drawn(1, VARIANTS)])
def test_the_same_zeros_after_settling_saving_and_folding(name, tmp_path):
    model = tiny()
    run = Run(model, [PASS[name]], STEPS).train()
    batch = labelled(seed=7)
    before, want, zeros = nonzero(model), logits(model, batch), sparsity(model)
    assert 0.3 < zeros < 0.99
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    after = nonzero(model)
    if name.startswith("block"):
        # What is really removed takes dead rows of live columns with it, never the other way round.
        assert all(after[path] <= before[path] for path in before)
        downs = [path for path in before if path.endswith("output.dense")]
        assert all(after[path] == before[path] for path in downs)
    else:
        assert after == before and sparsity(model) == zeros
    assert not any("gates" in key for key in model.state_dict())
    settled = logits(model, batch)
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert nonzero(loaded) == after and torch.equal(logits(loaded, batch), settled)
    plain = fold(model)
    assert nonzero(plain) == after and not any(isinstance(m, CompressedLinear) for m in plain.modules())
    plain.config._attn_implementation = TRAINING
    torch.testing.assert_close(logits(plain, batch), settled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ROWS)
def test_every_family_ships_its_masked_model(name, family):
    model, batch = classifier(family)
    run = Run(model, [PASS[name]], 4, batch).train()
    want, before = logits(model, batch), sparsity(model)
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=2e-5, rtol=1e-4)
    assert before > 0.3 and (name == "block" or sparsity(model) == before)


@pytest.mark.parametrize("name", PASS)
def test_only_the_layers_projections_are_gated(name):
    model = tiny("gpt2")
    names = set(dict(model.named_modules()))
    Run(model, [PASS[name]], STEPS)
    gated = {n.split(".gates")[0] for n in dict(model.named_modules()) if n.endswith(f".{PASS[name].type}")}
    paths = {path for path, _ in linears(model)}
    if name == "block":
        paths = {path for path in paths if not path.endswith("c_fc")}
    assert gated == paths and gated < names
    assert model.lm_head.weight is model.transformer.wte.weight, "tied tables stay tied"


@pytest.mark.dear
@pytest.mark.parametrize("name", [*ROWS, *drawn(1, VARIANTS)])
def test_a_resumed_run_ends_with_the_same_bits(name):
    """Saved within the schedule and after it; the hook's extra call after a resume changes nothing."""
    one = PASS[name]
    run, saved = Run(tiny(), [Full(), one], STEPS), []

    def save(progress):
        if run.step in (1, 5):
            one.after_step(run.model, progress)
            saved.append(copy.deepcopy((run.model.state_dict(), run.optimiser.state_dict(), run.step)))

    reference = Run(tiny(), [Full(), one], STEPS).train().model.state_dict()
    run.train(watch=save)
    resumed = Run(tiny(), [Full(), one], STEPS)
    for model in (run.model, *(resumed.take(state).train().model for state in saved)):
        for key, value in model.state_dict().items():
            assert torch.equal(value, reference[key]), key
    run.finalize()
    resumed.finalize()
    settled = resumed.model.state_dict()
    assert all(torch.equal(value, settled[key]) for key, value in run.model.state_dict().items())


METHODS = {name: made(name) for name in ("full", "adapter", "probe")}


PAIRS = [*itertools.product(["full", "adapter"], PASS), ("probe", "magnitude"), ("probe", "sparsegpt")]


@pytest.mark.parametrize(("method", "name"), drawn(5, PAIRS))
def test_beside_methods_and_int8(method, name):
    """The weights may be frozen and an adapter behind them; int8 rounds what the gates leave, and keeps zeros."""
    model = tiny(hidden_dropout_prob=0.0)
    transforms = [METHODS[method], PASS[name], Int8(ranges="dynamic")]
    run = Run(model, transforms, 4, labelled(rows=6)).train()
    batch = labelled(seed=7)
    want, before = logits(model, batch), nonzero(model)
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=1e-4, rtol=1e-4)
    after = nonzero(model)
    if not name.startswith("block"):
        assert after == before
    plain = fold(model)
    for path in after:
        module = plain.get_submodule(path)
        assert int(getattr(module, "inner", module).weight.count_nonzero()) <= after[path]


def test_int8_and_movement_learn_together():
    """The fake-quantised product still gives the scores their gradient: masks change, and the task is learned."""
    model, batch = tiny(), labelled()
    one = Movement(sparsity=0.5, start=0.0, end=0.3, freeze=0.9, learning_rate=0.05)
    run = Run(model, [Full(), one, Int8()], 30, batch, learning_rate=1e-2)
    seen = []
    run.train(watch=lambda progress: seen.append(torch.cat([g.mask.flatten() for _, g in gated(one, model)])))
    assert not torch.equal(seen[10], seen[25]), "masks still move between the end of the schedule and the freeze"
    assert torch.equal(seen[27], seen[-1]), "and no more from there on"
    assert all(int(mask.sum()) == len(mask) // 2 for mask in seen[10:])
    run.finalize()
    assert float((logits(model, batch).argmax(-1) == batch["labels"]).float().mean()) == 1.0


@pytest.mark.parametrize("name", ["magnitude", "movement", "l0"])
def test_structured_beside_single_weights(name):
    model = tiny()
    parts = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)
    run = Run(model, [PASS[name], parts], STEPS).train()
    batch = labelled(seed=7)
    want = logits(model, batch)
    run.finalize()
    torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)
    assert sparsity(model) > 0.3


@pytest.mark.parametrize("name", PASS)
def test_status_starts_at_zero_and_ends_at_its_target(name):
    one, model = PASS[name], tiny()
    run = Run(model, [one], STEPS)
    first = one.status(model, 0.0)
    run.train()
    last = one.status(model, 1.0)
    assert first.keys() == last.keys()
    for quantity, values in last.items():
        assert values.keys() == {"now", "planned", "target"}
        assert values["now"] == pytest.approx(values["target"], abs=0.02)
        assert values["planned"] == pytest.approx(values["target"])
        assert first[quantity]["now"] == 0.0 or isinstance(one, Wanda | SparseGPT)
    shown = {k: v["now"] for k, v in last.items() if k not in ("threshold", "penalty")}
    if shown.keys() == {"sparsity"}:
        assert shown["sparsity"] == pytest.approx(sparsity(model), abs=1e-3)


@pytest.mark.parametrize("name", PASS)
@pytest.mark.parametrize("other", ["magnitude", "movement", "l0", "block", "n_m", "wanda", "sparsegpt"])
def test_two_deciders_are_refused(name, other):
    if PASS[name].type != PASS[other].type:
        assert "keep one" in conflict([Full(), PASS[name], PASS[other]])
    for method in (Full(), Adapter()):
        assert conflict([method, PASS[name], Int8()]) is None


def test_other_conflicts_name_the_fix():
    parts = Structured(ffn=0.5)
    for one in (NM(), Wanda(pattern="2:4"), SparseGPT(pattern="1:4")):
        assert "earlier stage" in conflict([one, parts])
    for one in (Magnitude(sparsity=0.5), Wanda(sparsity=0.5), Movement(sparsity=0.5)):
        assert conflict([one, parts]) is None
    assert "keep one" in conflict([Block(sparsity=0.5), parts])
    assert "not after magnitude.start 0.5" in Magnitude(sparsity=0.5, start=0.5, end=0.5).check()
    assert "movement.sparsity" in Movement().check()
    assert "gets its sparsity from movement.penalty" in Movement(variant="soft", sparsity=0.5).check()
    assert "before movement.end" in Movement(sparsity=0.5, freeze=0.5).check()
    assert "before l0.end" in L0(freeze=0.5).check()
    for one in PASS.values():
        assert "set method.cache to false" in conflict([Probe(), one])
        assert conflict([Probe(cache=False), one]) is None


@pytest.mark.parametrize("name", PASS)
def test_exclude_leaves_parts_dense(name):
    one = PASS[name].model_copy(update={"exclude": ("q", "bert.encoder.layer.1.output.dense")})
    model = tiny()
    Run(model, [one], STEPS).train().finalize()
    kept = {path for path, module in linears(model) if bool(weight(module).ne(0).all())}
    assert "bert.encoder.layer.1.output.dense" in kept
    assert all(path in kept for path, _ in linears(model) if path.endswith("query"))
    for exclude, message in ((("keys",), "neither a part nor a module"), (LINEARS, "leaves nothing to prune")):
        with pytest.raises(UserError, match=message):
            Run(tiny(), [one.model_copy(update={"exclude": exclude})], STEPS)


def test_one_shots_want_data():
    for one in (Wanda(sparsity=0.5), SparseGPT(sparsity=0.5)):
        with pytest.raises(UserError, match=f"pass {one.type}: needs training rows"):
            one.prepare(tiny(), Context())


@pytest.mark.parametrize(("family", "m"), [("bert", 6), ("llama", 24)])
def test_columns_that_are_no_whole_groups_are_refused(family, m):
    for one in (NM(n=2, m=m), Wanda(pattern=f"2:{m}"), SparseGPT(pattern=f"2:{m}")):
        with pytest.raises(UserError, match=f"groups of {m} do not divide the 32 input columns of '.*0"):
            Run(classifier(family)[0], [one], STEPS)
