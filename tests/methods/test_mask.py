"""Mask-tuning: which weights may be left out, how scores start and learn, what stays frozen, one bit a weight."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.methods.mask import Mask, initial_scores
from compressft.model.load import load_model
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.modules.gate import ScoreGate
from compressft.modules.linear import CompressedLinear
from compressft.passes.magnitude import Magnitude
from compressft.passes.movement import Movement
from compressft.passes.nf4 import Nf4
from compressft.recipe.conflict import conflict
from compressft.transform import Context, trainable
from tests.methods.added import check_autocast
from tests.methods.universal import check_checkpointing, check_folders, check_resume
from tests.passes.sparse import Run, classifier
from tests.tiny import TINY, batch_for, labelled, logits, tiny

NOTHING = Mask(init="magnitude", initial_sparsity=0.0)
QUERY = "bert.encoder.layer.0.attention.self.query"


def prepared(method, family="bert", seed=0, **changes):
    model = tiny(family, **changes)
    method.prepare(model, Context(seed=seed))
    return model


def gates(model) -> dict[str, ScoreGate]:
    """Path of the layer -> its gate of scores."""
    return {
        path: module.gates["mask"]
        for path, module in model.named_modules()
        if isinstance(module, CompressedLinear) and "mask" in module.gates
    }


# Where.

LAYER = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
ALL = (*LAYER, "intermediate.dense", "output.dense")


def bert(layers, parts=ALL, pooler=True):
    return {f"bert.encoder.layer.{i}.{part}" for i in layers for part in parts} | (
        {"bert.pooler.dense"} & {pooler * "bert.pooler.dense"}
    )


def test_the_lowest_sixth_of_the_layers_is_left_alone():
    assert gates(prepared(Mask())).keys() == bert(range(2))
    assert gates(prepared(Mask(), num_hidden_layers=6)).keys() == bert(range(1, 6))
    assert gates(prepared(Mask(), num_hidden_layers=11)).keys() == bert(range(1, 11))
    assert gates(prepared(Mask(), num_hidden_layers=12)).keys() == bert(range(2, 12))
    assert gates(prepared(Mask(first_layer=1))).keys() == bert([1])


def test_parts_can_be_chosen():
    assert gates(prepared(Mask(parts=("q", "down")))).keys() == bert([0, 1], (ALL[0], ALL[5]), pooler=False)
    assert gates(prepared(Mask(preset="supermask"))).keys() == bert([0, 1], LAYER, pooler=False)
    assert gates(prepared(Mask(preset="supermask", parts=("pooler",)))).keys() == {"bert.pooler.dense"}
    # One projection holds all three.
    fused = {f"transformer.h.{i}.attn.c_attn" for i in range(2)}
    assert gates(prepared(Mask(parts=("q", "k", "v")), "gpt2")).keys() == fused


def test_places_that_are_not_there_are_refused():
    with pytest.raises(UserError, match=r"method\.first_layer: 2 is no layer; the model has 2"):
        prepared(Mask(first_layer=2))
    with pytest.raises(UserError, match=r"method\.parts: \['pooler'\] names nothing"):
        prepared(Mask(parts=("pooler",)), "distilbert")
    with pytest.raises(UserError, match=r"method\.parts: \['q'\] names nothing"):
        prepared(Mask(parts=("q",)), "gpt2")
    for wrong in ({"parts": ("query",)}, {"parts": ()}, {"initial_sparsity": 1.0}, {"learning_rate": 0}):
        with pytest.raises(ValidationError):
            Mask(**wrong)
    assert "initial_sparsity" in (Mask(initial_sparsity=0).check() or "")


def test_the_head_is_trained_or_masked():
    kept = {"classifier.weight", "classifier.bias"}
    scores = {f"{path}.gates.mask.scores" for path in bert(range(2))}
    assert {name for name, _ in trainable(prepared(Mask()))} == kept | scores
    assert {name for name, _ in trainable(prepared(Mask(head="masked")))} == scores | {"classifier.gates.mask.scores"}
    # A pooler that is not masked is trained like the rest of the head.
    some = {name for name, _ in trainable(prepared(Mask(parts=("q",))))}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= some
    # RoBERTa's head has two layers; a tied output embedding is no head.
    assert {p for p in gates(prepared(Mask(head="masked"), "roberta")) if p.startswith("classifier")} == {
        "classifier.dense",
        "classifier.out_proj",
    }
    assert all(".h." in path for path in gates(prepared(Mask(head="masked"), "gpt2")))


# How scores start.


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_uniform_scores_start_at_the_density(share):
    weight = torch.randn(200, 300)
    scores = initial_scores(weight, "uniform", share, torch.Generator().manual_seed(0))
    highest = (2e-2 + 1e-2) / share - 2e-2
    assert -2e-2 <= scores.min() < -1.9e-2 and 0.99 * highest < scores.max() <= highest
    if share == 0.05:
        assert highest == pytest.approx(0.58)
    dropped = float((scores <= 1e-2).float().mean())
    assert abs(dropped - share) < 3 * math.sqrt(share * (1 - share) / weight.numel())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.301])
def test_magnitude_drops_exactly_the_smallest(share):
    weight = torch.randn(13, 17, generator=torch.Generator().manual_seed(1))
    weight[:, :3] = 0.25
    scores = initial_scores(weight, "magnitude", share, torch.Generator())
    dropped = scores <= 1e-2
    assert int(dropped.sum()) == round(share * weight.numel())
    assert torch.isin(scores, torch.tensor([0.0, 2e-2])).all()
    if share:
        assert weight[dropped].abs().max() <= weight[~dropped].abs().min()


def test_seed_decides_the_scores():
    def all_scores(seed):
        return torch.cat([g.scores.detach().flatten() for g in gates(prepared(Mask(), seed=seed)).values()])

    assert torch.equal(all_scores(1), all_scores(1)) and not torch.equal(all_scores(1), all_scores(2))
    for path, gate in gates(prepared(Mask(initial_sparsity=0.5))).items():
        assert torch.equal(gate.mask, gate.scores > 1e-2), path
    two = [g.scores[:32, :32] for g in gates(prepared(Mask())).values()][:2]
    assert not torch.equal(*two), "every matrix is drawn anew"


@pytest.mark.parametrize("family", TINY)
def test_nothing_left_out_is_the_base(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(NOTHING, family)
    # GPT-2's projections compute their products in another order once they are CompressedLinears.
    tolerance = 1e-5 if family == "gpt2" else 0
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)
    for gate in gates(model).values():
        gate.threshold.fill_(1.0)
    assert not torch.allclose(logits(model, batch), want, atol=1e-2)


# How they learn.


def test_gradient_of_the_scores_is_that_of_the_weight_times_the_weight():
    model = prepared(Mask(initial_sparsity=0.5))
    linear = model.get_submodule(QUERY)
    batch = labelled(4)
    model(**batch).loss.backward()
    got = linear.gates["mask"].scores.grad.clone()
    # The same network with the masked weight in place: its own gradient.
    effective = linear.effective_weight().detach().requires_grad_()
    linear.forward = lambda x: F.linear(x, effective, linear.bias)
    model(**batch).loss.backward()
    want = effective.grad * linear.weight
    torch.testing.assert_close(got, want.detach())
    below = linear.gates["mask"].scores <= 1e-2
    assert below.any() and (got[below] != 0).all(), "what is left out may return"


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_only_scores_and_head_move(family):
    model, batch = classifier(family)
    run = Run(model, [Mask(learning_rate=0.05)], 6, batch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {path: gate.mask for path, gate in gates(model).items()}
    names = {name for name, _ in trainable(model)}
    run.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names and any(name.endswith("scores") for name in moved)
    assert any(not torch.equal(gate.mask, masks[path]) for path, gate in gates(model).items()), "no bit has flipped"
    weights = {path: model.get_submodule(path).weight.clone() for path in masks}
    run.finalize()
    for path, weight in weights.items():
        folded = model.get_submodule(path).weight
        kept = folded != 0
        assert torch.equal(folded[kept], weight[kept]) and 0 < int((~kept).sum()) < kept.numel()


def test_scores_have_their_own_rate_and_no_decay():
    method = Mask(learning_rate=0.25)
    model = prepared(method)
    (group,) = method.param_groups(model, Context())
    assert group["lr"] == 0.25 and group["weight_decay"] == 0.0
    assert {id(p) for p in group["params"]} == {id(g.scores) for g in gates(model).values()}


def test_supermask_starts_at_its_target():
    method = Mask(preset="supermask", initial_sparsity=0.25)
    model = prepared(method)
    shown = method.status(model, 0.0)["masked"]["now"]
    assert shown == pytest.approx(0.25)
    assert Mask(preset="supermask", init="uniform")._set("init") == "uniform"


# Next to the rest.


def test_gates_of_a_pass_multiply():
    method, prune = Mask(initial_sparsity=0.3), Magnitude(sparsity=0.5, start=0.0, end=0.4)
    run = Run(tiny(), [method, prune], 5).train()
    linear = run.model.get_submodule(QUERY)
    kept = linear.gates["mask"].mask & linear.gates["magnitude"].mask
    assert torch.equal(linear.effective_weight() != 0, kept)
    assert int(kept.sum()) < int(linear.gates["magnitude"].mask.sum())
    before, weight = logits(run.model, labelled()), linear.weight.clone()
    run.finalize()
    assert torch.equal(logits(run.model, labelled()), before)
    assert torch.equal(linear.weight, weight * kept)


def test_two_learned_masks_are_refused():
    assert "from one gradient" in conflict([Mask(), Movement(sparsity=0.5)])
    assert conflict([Mask(), Magnitude(sparsity=0.5), Nf4()]) is None


def test_on_a_base_of_four_bits():
    """Masks over NF4 codes give what they give over the weights that the codes stand for."""
    model = prepared(Mask(preset="supermask"))
    Nf4().prepare(model, Context())
    assert model.get_submodule(QUERY).store is not None
    batch = labelled()
    before = logits(model, batch)
    dense = {path: model.get_submodule(path).weight.clone() for path in gates(model)}
    other = prepared(Mask(preset="supermask"))
    for path, module in other.named_modules():
        if isinstance(module, CompressedLinear):
            module.weight.data = dense[path]
            module.gates["mask"].load_state_dict(model.get_submodule(path).gates["mask"].state_dict())
    for name, parameter in other.named_parameters():
        # Projections without a mask are in four bits as well.
        source = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(source, CompressedLinear):
            parameter.data = source.weight.clone()
    torch.testing.assert_close(before, logits(other, batch), atol=1e-5, rtol=1e-5)
    Mask(preset="supermask").finalize(model)
    Nf4().finalize(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-5, rtol=1e-5)


def test_recomputed_activations_and_autocast():
    check_checkpointing(Mask())
    check_autocast(Mask(), "llama")


def test_resumed_is_the_same():
    check_resume(Mask(learning_rate=0.05))


# Folders.


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_delta_is_a_bit_a_weight_and_the_head(tmp_path, share):
    stored, _ = check_folders(Mask(initial_sparsity=share, head="masked"), tmp_path)
    masked = gates(prepared(Mask()))
    places = {name: t for name, t in stored.items() if not name.startswith("classifier")}
    assert {name.partition("#")[0] for name in places} == {f"{path}.weight" for path in masked}
    size = sum(t.nbytes for t in places.values())
    formula = sum(gate.scores.shape[0] * ((gate.scores.shape[1] + 7) // 8) for gate in masked.values())
    if share == 0.5:
        assert size == formula
        assert sum(t.nbytes for t in stored.values()) - size <= 4 * 3 * 32 + 16 + 4 * 3
    else:
        assert size < 0.6 * formula


def test_two_tasks_share_one_base(tmp_path):
    base = tmp_path / "base"
    tiny("bert", architecture="BertModel").save_pretrained(base)
    tensors = base_tensors(str(base))
    models = []
    for seed in (1, 2):
        model = load_model(str(base), "AutoModelForSequenceClassification", num_labels=3)
        method = Mask(initial_sparsity=0.4)
        method.prepare(model, Context(seed=seed))
        method.finalize(model)
        save_delta(model, None, tensors, tmp_path / str(seed), {"model": str(base)})
        models.append(model)
    outputs = [logits(load_delta(tmp_path / str(seed)), labelled()) for seed in (1, 2)]
    assert not torch.allclose(*outputs)
    assert all(torch.equal(a, logits(b, labelled())) for a, b in zip(outputs, models, strict=True))
