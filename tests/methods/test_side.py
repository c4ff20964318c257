"""Side-tuning: the blend, its limits and gradients; copy, ladder and another model; no graph in the backbone."""

import pytest
import torch
from pydantic import ValidationError

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.methods.side import Side
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.linear import bare
from compressft.passes.depth import Depth
from compressft.passes.structured import Structured
from compressft.passes.ziplm import ZipLM
from compressft.recipe.conflict import conflict
from compressft.transform import Context, trainable
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

KINDS = {"copy": Side(), "ladder": Side(network="ladder", size=8)}


def side_of(model):
    return anatomy(model).backbone.side


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """Another model: one layer, 16 wide."""
    folder = tmp_path_factory.mktemp("smaller")
    settings = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    tiny("bert", architecture="BertModel", **settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_new_ladder_are_the_identity(family, kind):
    model = prepared(KINDS[kind], headed(family))
    want = logits(headed(family), batch_for(family))
    for blend in (0.0, -3.0, 2.0):
        with torch.no_grad():
            side_of(model).blend.fill_(blend)
        torch.testing.assert_close(logits(model, batch_for(family)), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(shaken(model, "side."), batch_for(family)), want, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_the_blend(family):
    """R = alpha B + (1 - alpha) S on the final hidden states, alpha = sigmoid(a)."""
    model, plain = shaken(prepared(Side(), headed(family)), "side.network."), headed(family)
    batch = batch_for(family)
    b = plain.base_model(**batch).last_hidden_state
    s = side_of(model).network(**batch).last_hidden_state
    side_of(model).blend.fill_(1.39)
    alpha = torch.sigmoid(torch.tensor(1.39))
    got = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(got, alpha * b + (1 - alpha) * s, atol=1e-5, rtol=1e-5)
    for value, limit in ((40.0, b), (-40.0, s)):
        side_of(model).blend.fill_(value)
        torch.testing.assert_close(model.base_model(**batch).last_hidden_state, limit, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_ladders_equations(family):
    """s_0 = D_0 h_0, s_i = rung_i(mu_i s_(i-1) + (1 - mu_i) D_i h_i), S = B + U s_L, as they are written."""
    model, batch = shaken(prepared(Side(network="ladder", size=32), headed(family)), "side."), batch_for(family)
    h = headed(family).base_model(**batch, output_hidden_states=True).hidden_states
    side, tokens = side_of(model), batch["input_ids"].shape[1]
    seen = batch["attention_mask"].bool()[:, None, :].expand(-1, tokens, -1)
    if family == "llama":
        seen = (seen & torch.ones(tokens, tokens, dtype=torch.bool).tril()) | torch.eye(tokens, dtype=torch.bool)

    def normed(norm, s):
        return (s - s.mean(-1, keepdim=True)) / (
            s.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * norm.weight + norm.bias

    def linear(module, x):
        return x @ module.weight.t() + module.bias

    s = linear(side.down[0], h[0])
    for i in (1, 2):
        mu, rung = 1 / (1 + torch.exp(-side.mix[i - 1])), side.rungs[i - 1]
        s = mu * s + (1 - mu) * linear(side.down[i], h[i])
        queries, keys, values = linear(rung.attention, normed(rung.attention_norm, s)).split(32, dim=-1)
        heads = []
        for q, k, v in zip(*(part.split(16, dim=-1) for part in (queries, keys, values)), strict=True):
            scores = (q @ k.transpose(1, 2) / 16**0.5).masked_fill(~seen, -torch.inf)
            heads.append(scores.softmax(-1) @ v)
        s = s + linear(rung.attention_out, torch.cat(heads, -1))
        x = linear(rung.inner, normed(rung.norm, s))
        s = s + linear(rung.outer, x * 0.5 * (1 + torch.erf(x / 2**0.5)))
    beside = h[2] + linear(side.up, s)
    alpha = 1 / (1 + torch.exp(-side.blend))
    got = model.base_model(**batch).last_hidden_state
    torch.testing.assert_close(got, alpha * h[2] + (1 - alpha) * beside, atol=1e-4, rtol=1e-4)
    assert side_of(prepared(Side(network="ladder"), headed())).size == 32 // 8


@torch.no_grad()
def test_a_ladder_sees_no_padding_and_nothing_later():
    """A row between padding on either side is the row alone, and a token knows those before it only."""
    model = shaken(prepared(KINDS["ladder"], tiny("llama")), "side.")
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    alone = model(ids).logits
    torch.testing.assert_close(model(ids[:, :4]).logits, alone[:, :4])
    padded_ids = torch.nn.functional.pad(ids, (3, 2))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    between = model(padded_ids, attention_mask=mask, position_ids=places).logits
    assert between.isfinite().all()
    torch.testing.assert_close(between[:, 3:9], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="reads attention_mask as"):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))


def test_gradient_of_alpha():
    model = shaken(prepared(Side(), headed()), "side.network.")
    side, batch = side_of(model), padded()
    with torch.no_grad():
        side.blend.fill_(0.4)
        b = headed().bert(**batch).last_hidden_state
        s = side.network(**batch).last_hidden_state
    up = torch.randn_like(b)
    model.bert(**batch).last_hidden_state.backward(up)
    alpha = torch.sigmoid(side.blend.detach())
    assert side.blend.grad.item() == pytest.approx(((up * (b - s)).sum() * alpha * (1 - alpha)).item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_graph_in_the_backbone(kind, family):
    model = prepared(KINDS[kind], headed(family)).train()
    inside, saved = [], []
    for layer in anatomy(model).layers:
        layer.module.register_forward_pre_hook(lambda m, a: inside.append(m))
        layer.module.register_forward_hook(lambda m, a, out: (inside.clear(), saved.append(out.grad_fn))[:0] or None)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(len(inside)), t)[1], lambda t: t):
        loss = model(**rows_for(family)).loss
    loss.backward()
    assert kept and not any(kept) and saved == [None, None]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("kind", KINDS)
def test_trainable_set(kind, check_training):
    model = headed()
    Side.prepare(KINDS[kind], trial := headed(), Context())
    expected = names_of(trial, ".side.")
    if kind == "copy":
        # The first step of a copy equals the base: all of it moves afterwards.
        assert "bert.side.network.embeddings.word_embeddings.weight" in expected
    else:
        assert not any("network" in name for name in expected)
    KINDS[kind].prepare(model, Context())
    assert {name for name, _ in trainable(model)} == expected
    fit(model, [KINDS[kind]], [labelled()], 3)
    check_frozen_base(model, headed())
    assert side_of(model).blend.requires_grad
    (group,) = KINDS[kind].param_groups(model, Context())
    assert group["weight_decay"] == 0.0 and group["params"][0] is side_of(model).blend


@pytest.mark.parametrize(("family", "head"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_families_and_heads(family, head, kind, tmp_path):
    model = trained(KINDS[kind], headed(family, head), rows_for(family, head))
    check_frozen_base(model, headed(family, head))
    check_round_trips(model, family, tmp_path)


def test_another_model_beside(smaller, tmp_path):
    method = Side(network=smaller)
    model = prepared(method, headed())
    side = side_of(model)
    assert side.project.weight.shape == (32, 16) and side.network.pooler is None
    with torch.no_grad():
        batch = padded()
        s = side.project(tiny("bert", architecture="BertModel", num_hidden_layers=1, hidden_size=16,
                              num_attention_heads=2, intermediate_size=24)(**batch).last_hidden_state)  # fmt: skip
        want = 0.5 * headed().bert(**batch).last_hidden_state + 0.5 * s
        torch.testing.assert_close(model.bert(**batch).last_hidden_state, want, atol=1e-5, rtol=1e-5)
    model = trained(method, headed(), rows_for("bert"))
    check_round_trips(model, "bert", tmp_path)
    # A BERT next to a model that knows no segments.
    check_round_trips(trained(method, headed("distilbert"), rows_for("distilbert")), "distilbert", tmp_path / "other")
    prepared(method, headed())
    assert torch.equal(*(side_of(prepared(method, headed())).project.weight for _ in range(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_segments_reach_the_side_network(kind):
    model = prepared(KINDS[kind], headed())
    batch = padded()
    batch["token_type_ids"] = (batch["input_ids"] % 2) * batch["attention_mask"]
    torch.testing.assert_close(logits(model, batch), logits(headed(), batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_precision_memory_and_nf4(family, kind):
    check_checkpointing(KINDS[kind], family)
    check_autocast(KINDS[kind], family)
    check_nf4(KINDS[kind], family)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """Smaller models, and one whose attention slides: its cache holds other layers than B's."""
    folder = tmp_path_factory.mktemp("decoders")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    for name, one in {
        "llama": {"num_hidden_layers": 1},
        "mistral": {"num_hidden_layers": 3, "sliding_window": 3},
    }.items():
        tiny(name, **sizes, **one).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("llama", "mistral")}


@pytest.mark.parametrize("kind", ["copy", "ladder", "llama", "mistral"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation(family, kind, decoders, tmp_path):
    method = KINDS[kind] if kind in KINDS else Side(network=decoders[kind])
    save_compressed(shaken(prepared(method, tiny(family)), "side."), None, tmp_path / "model", {})
    model = load_compressed(tmp_path / "model")
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(2))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    greedy = [model.generate(**batch, use_cache=on, do_sample=False, **settings) for on in (True, False)]
    assert torch.equal(*greedy) and not torch.equal(greedy[0], tiny(family).generate(**batch, **settings))
    # Beams are repeated and reordered in the cache.
    beams = [model.generate(**batch, use_cache=on, num_beams=3, do_sample=False, **settings) for on in (True, False)]
    assert torch.equal(*beams)
    check_steps(model, ids)


@torch.no_grad()
def check_steps(model, ids):
    """Four tokens at once, then one: with a cache that the model makes itself, and that loses its last token."""
    want = model(ids, use_cache=False).logits
    out = model(ids[:, :4], use_cache=True)
    again = model(ids[:, 4:], past_key_values=out.past_key_values)
    torch.testing.assert_close(torch.cat([out.logits, again.logits], 1), want, atol=1e-5, rtol=1e-5)
    if not any(again.past_key_values.is_sliding):
        again.past_key_values.crop(-1)
        once_more = model(ids[:, 4:], past_key_values=again.past_key_values)
        assert torch.equal(once_more.logits, again.logits)


def test_caches_that_cannot_be_shared():
    model = shaken(prepared(KINDS["copy"], tiny("llama")), "side.")
    ids = padded(1)["input_ids"][:, :4]
    with pytest.raises(UserError, match="are not kept in a StaticCache; generate without cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2, pad_token_id=0)
    with bare():
        cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UserError, match="was filled without the side network; start with an empty one"):
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_bare_is_the_base(kind):
    model = shaken(prepared(KINDS[kind], headed()), "side.")
    with bare():
        assert torch.equal(logits(model, padded()), logits(headed(), padded()))


def test_passes_compress_the_backbone_alone():
    model, method = headed(), KINDS["copy"]
    ffn = Structured(ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5)
    for transform in (method, ffn):
        transform.prepare(model, Context([method, ffn]))
    fit(model, [method, ffn], [labelled(8)], 4)
    before = logits(model, padded())
    for transform in (method, ffn):
        transform.finalize(model)
    torch.testing.assert_close(logits(model, padded()), before, atol=1e-5, rtol=1e-5)
    assert sum(layer.ffn for layer in anatomy(model).layers) == 64
    assert side_of(model).network.encoder.layer[0].output.dense.in_features == 64


def test_what_is_refused(tmp_path, smaller):
    with pytest.raises(ValidationError, match="size is the ladder's width, network is 'copy'"):
        Side(size=4)
    model = prepared(Side(), headed())
    with pytest.raises(UserError, match="an earlier stage left a side network"):
        Side().prepare(model, Context())
    with pytest.raises(UserError, match="has 97 vocabulary rows, the model 50"):
        Side(network=smaller).prepare(headed(vocab_size=50), Context())
    with pytest.raises(UserError, match="sees later tokens"):
        Side(network=smaller).prepare(tiny("llama"), Context())
    with pytest.raises(UserError, match="has 40 positions, the model 64"):
        Side(network=smaller).prepare(headed(max_position_embeddings=64), Context())
    tiny("bart").save_pretrained(tmp_path / "bart")
    with pytest.raises(UserError, match="is an encoder-decoder"):
        Side(network=str(tmp_path / "bart")).prepare(headed(), Context())
    with pytest.raises(UserError, match=r"could not be loaded|does not exist"):
        Side(network=str(tmp_path / "nowhere")).prepare(headed(), Context())
    adapted = prepared(Adapter(placement="pfeiffer", size=4), headed())
    with pytest.raises(UserError, match="'copy' is a compressed model"):
        Side().prepare(adapted, Context())
    assert "removes hidden" in conflict([Side(), Structured(hidden=0.5)])
    assert conflict([Side(), Structured(ffn=0.5)]) is None and conflict([Side(), Depth(keep=[0])]) is None
    assert "set it to 'ladder', or cut in a stage after" in conflict([Side(), ZipLM(target={"sparsity": 0.4})])
    assert conflict([KINDS["ladder"], ZipLM(target={"sparsity": 0.4})]) is None


def test_draws_from_its_own_generator(smaller):
    for method in (*KINDS.values(), Side(network=smaller)):
        model = headed()
        state = torch.get_rng_state()
        method.prepare(model, Context(seed=3))
        assert torch.equal(torch.get_rng_state(), state)
