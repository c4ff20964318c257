"""Scalar mix: the mean of the layers at first, ELMo's normalisation by hand, gradients, padding, saving, export."""

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.scalar_mix import ScalarMix, mix_of
from compressft.model.anatomy import anatomy
from compressft.modules.linear import bare
from compressft.modules.scalar_mix import LayerMix
from compressft.passes.depth import Depth
from compressft.passes.structured import Structured
from compressft.recipe.conflict import conflict
from compressft.transform import Context
from tests.methods.added import (
    CASES,
    FAMILIES,
    check_autocast,
    check_checkpointing,
    check_frozen_base,
    check_nf4,
    check_round_trips,
    headed,
    names_of,
    prepared,
    rows_for,
    shaken,
    trained,
)
from tests.tiny import batch_for, fit, labelled, logits, padded, tiny


def last_states(model, batch):
    with torch.no_grad():
        return model.base_model(**batch).last_hidden_state


def layer_states(family):
    """Embeddings' and layers' outputs of the plain model, in pre-norm families without the final norm; and that."""
    model = headed(family)
    seen = []
    for layer in anatomy(model).layers:
        layer.module.register_forward_pre_hook(
            lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        layer.module.register_forward_hook(lambda m, a, out: seen.append(out))
    last_states(model, batch_for(family))
    norm = anatomy(model).family.final_norm
    states = [seen[0], seen[1], seen[3]]
    return [s.detach() for s in states], model.base_model.get_submodule(norm) if norm else (lambda x: x)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embeddings", [True, False])
def test_it_starts_as_the_mean_of_the_layers(family, embeddings):
    model = prepared(ScalarMix(embeddings=embeddings), headed(family))
    states, norm = layer_states(family)
    want = norm(torch.stack(states if embeddings else states[1:]).mean(0))
    torch.testing.assert_close(last_states(model, batch_for(family)), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, batch_for(family)), logits(headed(family), batch_for(family)), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_50_is_the_last_layer(family):
    model = prepared(ScalarMix(), headed(family))
    mix_of(model).weights[-1] = 50.0
    torch.testing.assert_close(
        logits(model, batch_for(family)), logits(headed(family), batch_for(family)), atol=1e-5, rtol=1e-5
    )
    mix_of(model).gamma.fill_(2.0)
    if anatomy(model).family.final_norm is None:
        want = 2 * last_states(headed(family), batch_for(family))
        torch.testing.assert_close(last_states(model, batch_for(family)), want, atol=1e-5, rtol=1e-5)


def test_gradient_of_gamma():
    mix = LayerMix(3, True, "none")
    with torch.no_grad():
        mix.gamma.fill_(1.7)
        mix.weights.copy_(torch.tensor([0.3, -1.0, 0.5]))
    states = [torch.randn(2, 3, 4) for _ in range(3)]
    out, up = mix(states), torch.randn(2, 3, 4)
    out.backward(up)
    assert mix.gamma.grad.item() == pytest.approx((up * out / 1.7).sum().item(), rel=1e-4)
    shares = torch.softmax(mix.weights, 0).detach()
    torch.testing.assert_close(out, 1.7 * sum(s * h for s, h in zip(shares, states, strict=True)))
    with pytest.raises(ValueError, match="2 layers' outputs given, 3 weights"):
        mix(states[:2])


@torch.no_grad()
@pytest.mark.parametrize("normalise", ["batch", "row"])
def test_normalisation_by_hand(normalise):
    """AllenNLP's rule: one mean and one variance over all unmasked elements, not per token."""
    mix = LayerMix(2, True, normalise)
    x, mask = torch.randn(3, 5, 4) * 3 + 1, padded(3, 5)["attention_mask"]
    want = torch.empty_like(x)
    for rows in [range(3)] if normalise == "batch" else [[0], [1], [2]]:
        elements = torch.cat([x[r][mask[r].bool()].flatten() for r in rows])
        for r in rows:
            want[r] = (x[r] - elements.mean()) / elements.std(correction=0)
    torch.testing.assert_close(mix([x, x], mask), want, atol=1e-5, rtol=1e-5)
    whole = mix([x, x])
    assert not torch.allclose(whole, want, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("normalise", ["none", "batch", "row"])
def test_padding_changes_nothing(normalise):
    model = shaken(prepared(ScalarMix(normalise=normalise), headed()), "scalar_mix.")
    batch = padded()
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    torch.testing.assert_close(logits(model, wide), logits(model, batch), atol=1e-5, rtol=1e-5)
    row = {name: value[:1] for name, value in batch.items()}
    alone = logits(model, row)
    assert torch.allclose(alone, logits(model, batch)[:1], atol=1e-5) == (normalise != "batch")


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_trainable_set(family):
    model = headed(family)
    plain = headed(family)
    expected = names_of(model) | {f"{model.base_model_prefix}.scalar_mix.{name}" for name in ("weights", "gamma")}
    model = trained(ScalarMix(), model, rows_for(family), steps=3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    check_frozen_base(model, plain)
    assert mix_of(model).weights.abs().min() > 0 and mix_of(model).gamma != 1


def test_penalty_and_decay():
    method = ScalarMix(penalty=0.5)
    model = prepared(method, headed())
    with torch.no_grad():
        mix_of(model).weights.copy_(torch.tensor([1.0, 2.0, 0.0]))
    penalty = method.loss(model, {}, None, Context())["scalar_mix.penalty"]
    penalty.backward()
    assert penalty.item() == pytest.approx(2.5) and mix_of(model).weights.grad.tolist() == [1.0, 2.0, 0.0]
    assert ScalarMix().loss(model, {}, None, Context()) == {}
    (group,) = method.param_groups(model, Context())
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


@pytest.mark.parametrize(("family", "head"), CASES)
def test_families_and_heads(family, head, tmp_path):
    model = trained(ScalarMix(), headed(family, head), rows_for(family, head))
    check_round_trips(model, family, tmp_path)


def test_no_graph_in_the_backbone():
    model = prepared(ScalarMix(), headed()).train()
    seen = []
    for layer in anatomy(model).layers:
        layer.module.register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    model(**labelled(4)).loss.backward()
    assert seen == [False, False]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_precision_memory_and_nf4(family):
    check_checkpointing(ScalarMix(), family)
    check_autocast(ScalarMix(), family)
    check_nf4(ScalarMix(), family)


def test_hidden_states_and_cached_generation():
    model = shaken(prepared(ScalarMix(), tiny("llama")), "scalar_mix.")
    ids = padded(1)["input_ids"][:, :4]
    both = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=on, pad_token_id=0) for on in (True, False)
    ]
    assert torch.equal(*both)
    bert = shaken(prepared(ScalarMix(), headed()), "scalar_mix.")
    with torch.no_grad():
        out = bert.bert(**padded(), output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_bare_is_the_base():
    model = prepared(ScalarMix(), headed())
    with bare():
        assert torch.equal(logits(model, padded()), logits(headed(), padded()))


def test_compiling_changes_nothing():
    """Hooks and all."""
    model = shaken(prepared(ScalarMix(normalise="row"), headed("distilbert", n_layers=1)), "scalar_mix.")
    want = logits(model, padded())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, padded()), want, atol=1e-5, rtol=1e-5)


def test_a_second_stage_goes_on():
    model = shaken(prepared(ScalarMix(), headed()), "scalar_mix.")
    want = logits(model, padded())
    ScalarMix().prepare(model, Context())
    assert torch.equal(logits(model, padded()), want) and mix_of(model).weights.requires_grad
    with pytest.raises(UserError, match="an earlier stage mixes other layers"):
        ScalarMix(embeddings=False).prepare(model, Context())


def test_what_is_refused():
    with pytest.raises(UserError, match="'batch' lets tokens see later ones"):
        ScalarMix(normalise="batch").prepare(headed("gpt2"), Context())
    for fields, kind in (({"layers": 0.5}, "layers"), ({"hidden": 0.5}, "hidden")):
        assert f"removes {kind}" in conflict([ScalarMix(), Structured(**fields)])
    assert conflict([ScalarMix(), Structured(ffn=0.5), Depth(keep=[0])]) is None
    # In a later stage the mix may be forgotten by the recipe: a final norm that is replaced is noticed.
    model = prepared(ScalarMix(), headed("llama"))
    Structured(hidden=0.5, align_hidden=8).prepare(model, Context())
    with pytest.raises(UserError, match="what stood above the top layer was replaced"):
        logits(model, padded())


def test_beside_a_pass_that_learns_gates():
    """Importance flows through the mix into the frozen layers' gates."""
    model, method = headed(), ScalarMix()
    pass_ = Structured(ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)
    for transform in (method, pass_):
        transform.prepare(model, Context([method, pass_]))
    fit(model, [method, pass_], [labelled(8)], 4)
    before = logits(model, padded())
    for transform in (method, pass_):
        transform.finalize(model)
    assert anatomy(model).layers[0].ffn + anatomy(model).layers[1].ffn == 64
    torch.testing.assert_close(logits(model, padded()), before, atol=1e-5, rtol=1e-5)


def test_draws_nothing():
    model = headed()
    state = torch.get_rng_state()
    ScalarMix().prepare(model, Context())
    assert torch.equal(torch.get_rng_state(), state)
