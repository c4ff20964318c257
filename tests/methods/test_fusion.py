"""AdapterFusion: the paper's equations in plain torch, its properties (a) to (f), what is refused, what ships."""

import json
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from compressft.errors import UserError
from compressft.methods.fusion import Fusion, fusions
from compressft.model.anatomy import anatomy
from compressft.model.saved.adapters import read_adapters
from compressft.modules.bottleneck import AdaptedNorm
from compressft.modules.linear import bare
from compressft.passes.depth import Depth
from compressft.passes.structured import Structured
from compressft.passes.vocabulary import Vocabulary
from compressft.passes.ziplm import ZipLM
from compressft.recipe.conflict import conflict
from compressft.transform import Context, trainable
from tests.methods.added import (
    CASES,
    check_autocast,
    check_checkpointing,
    check_frozen_base,
    check_gradients,
    check_nf4,
    check_round_trips,
    freeze_head,
    headed,
    names_of,
    prepared,
    rows_for,
    save_adapter,
    shaken,
    trained,
)
from tests.tiny import accuracy, batch_for, fit, labelled, logits, padded, tiny

TRAINED = ("query_weight", "query_bias", "key_weight", "key_bias", "value_weight")
ATTENTION = tuple(f".adapter.{name}" for name in TRAINED)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three adapters of each family, sizes 4, 6 and 4."""
    made = {}

    def folders(family="bert", number=3):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            sizes = (4, 6, 4)
            made[family] = [
                save_adapter(root / str(i), partial(headed, family), seed=i, size=sizes[i]) for i in range(3)
            ]
        return tuple(made[family][:number])

    return folders


def reference(fusion, parts, x, residual):
    """Section 3.2 as written: every z_n, K_n and V_n on its own. `parts`: (down, b, up, b) per adapter."""
    query = F.linear(x, fusion.query_weight, fusion.query_bias)
    outputs = [F.linear(F.relu(F.linear(x, down, a)), up, b) for down, a, up, b in parts]
    scores = [(query * F.linear(z, fusion.key_weight, fusion.key_bias)).sum(-1) for z in outputs]
    shares = torch.softmax(torch.stack(scores, -1), -1)
    values = torch.stack([F.linear(z, fusion.value_weight) for z in outputs], -2)
    return residual + (shares[..., None] * values).sum(-2), shares


def parts_of(one, layer=0):
    (adapter,) = one.layers[layer]
    return adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_papers_equations(saved, number):
    model = shaken(prepared(Fusion(adapters=saved(number=number)), headed()), *ATTENTION)
    adapters = read_adapters(headed(), saved(number=number), "here")
    x, residual = torch.randn(3, 5, 32), torch.randn(3, 5, 32)
    for layer, fusion in enumerate(fusions(model)):
        want, shares = reference(fusion, [parts_of(one, layer) for one in adapters], x, residual)
        torch.testing.assert_close(fusion(x, residual), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fusion.shares(x), shares, atol=1e-5, rtol=1e-4)
        assert shares.shape[-1] == number and (number > 1) == bool((shares.std(-1, correction=0) > 1e-3).any())


def test_gradients_through_the_layer_above(saved):
    """Of layer 0's fusion: through the query, the adapters and the residual of layer 1's."""
    model = shaken(prepared(Fusion(adapters=saved()), headed()), *ATTENTION)
    check_gradients(model, labelled(4), "encoder.layer.0.")


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_place_in_a_post_norm_layer(saved, family):
    """out = LN(fusion(LN(f + h)) + h): the one LayerNorm before and after."""
    model, plain = shaken(prepared(Fusion(adapters=saved(family)), headed(family)), *ATTENTION), headed(family)
    layer = anatomy(model).layers[0]
    norm = layer.part(layer.family.ffn_norm)
    assert isinstance(norm, AdaptedNorm)
    own = anatomy(plain).layers[0].part(layer.family.ffn_norm)
    z = torch.randn(2, 3, 32)
    parts = [parts_of(one) for one in read_adapters(plain, saved(family), "here")]
    torch.testing.assert_close(norm(z), own(reference(norm.adapter, parts, own(z), z)[0]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_place_in_a_pre_norm_layer(saved):
    model, plain = shaken(prepared(Fusion(adapters=saved("llama")), headed("llama")), *ATTENTION), headed("llama")
    h = torch.randn(2, 3, 32)
    f = plain.model.layers[0].mlp(h)
    parts = [parts_of(one) for one in read_adapters(plain, saved("llama"), "here")]
    want, _ = reference(model.model.layers[0].mlp.down_proj.adapter, parts, f, f)
    torch.testing.assert_close(model.model.layers[0].mlp(h), want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_equal_adapters_are_one(saved):
    """(a): whatever Q and K are, N equal adapters give the single adapter's block, up to W_v's 1e-6."""
    one = saved(number=1)[0]
    model = shaken(prepared(Fusion(adapters=(one,) * 4), headed()), *ATTENTION[:4])
    alone = prepared(Fusion(adapters=(one,)), headed())
    (adapter,) = read_adapters(headed(), (one,), "here")[0].layers[1]
    for many, single in zip(fusions(model), fusions(alone), strict=True):
        x, residual = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
        torch.testing.assert_close(many(x, residual), single(x, residual), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(single(x, residual), adapter(x, residual), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(single(x, residual), residual, atol=1e-2)


@torch.no_grad()
def test_b_one_adapter_gets_everything(saved):
    model = shaken(prepared(Fusion(adapters=saved(number=1)), headed()), *ATTENTION)
    for fusion in fusions(model):
        assert torch.equal(fusion.shares(torch.randn(4, 32)), torch.ones(4, 1))


@torch.no_grad()
def test_c_their_order_matters_to_the_shares_alone(saved):
    folders = saved()
    order = [2, 0, 1]
    first = shaken(prepared(Fusion(adapters=folders), headed()), *ATTENTION)
    second = shaken(prepared(Fusion(adapters=tuple(folders[i] for i in order)), headed()), *ATTENTION)
    for one, other in zip(fusions(first), fusions(second), strict=True):
        x = torch.randn(3, 32)
        torch.testing.assert_close(one(x), other(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.shares(x)[:, order], other.shares(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(first, padded()), logits(second, padded()), atol=1e-5, rtol=1e-5)


def test_d_the_regulariser(saved):
    model = prepared(Fusion(adapters=saved()), headed())
    terms = Fusion(adapters=saved()).loss(model, {}, None, Context())
    # 1e-6 everywhere but on the diagonal, two layers.
    assert terms["fusion.regularisation"].item() == pytest.approx(0.01 * 2 * 32 * 31 * 1e-12)
    with torch.no_grad():
        for fusion in fusions(model):
            fusion.value_weight.copy_(torch.eye(32))
    assert Fusion(adapters=saved()).loss(model, {}, None, Context())["fusion.regularisation"] == 0
    with torch.no_grad():
        next(fusions(model)).value_weight[3, 5] = 2.0
    term = Fusion(adapters=saved(), regularisation=0.1).loss(model, {}, None, Context())["fusion.regularisation"]
    assert term.item() == pytest.approx(0.4)
    term.backward()
    assert next(fusions(model)).value_weight.grad[3, 5].item() == pytest.approx(0.4)
    assert Fusion(adapters=saved(), regularisation=0.0).loss(model, {}, None, Context()) == {}


def test_f_temperature_follows_training_alone(saved):
    method = Fusion(adapters=saved(), temperature=50.0, anneal=0.5)
    model = prepared(method, headed())
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    fusion = next(fusions(shaken(model, *ATTENTION)))
    with torch.no_grad():
        method.after_step(model, 1.0)
        sharp = fusion.shares(x)
        method.after_step(model, 0.0)
        flat = fusion.shares(x)
        assert fusion.temperature == 50 and (flat - 1 / 3).abs().max() < (sharp - 1 / 3).abs().max() / 5
        for _ in range(3):
            model.eval()(**padded())
            model.train()(**padded())
        assert fusion.temperature == 50
        method.after_step(model, 0.25)
        assert fusion.temperature == pytest.approx(25.5)
        # A resumed run is where it was.
        again = prepared(method, headed())
        method.after_step(again, 0.25)
        assert next(fusions(again)).temperature == fusion.temperature
        method.after_step(model, 0.75)
        assert fusion.temperature == 1
        before = logits(model.eval(), padded())
        method.finalize(model)
        assert torch.equal(logits(model, padded()), before)


def test_dropout_acts_on_the_scores(saved):
    method = Fusion(adapters=saved(), dropout=0.5)
    model = prepared(method, headed())
    fusion = next(fusions(shaken(model, *ATTENTION)))
    x = torch.randn(400, 32)
    with torch.no_grad():
        clean = fusion.eval().shares(x)
        noisy = fusion.train().shares(x)
    # Dropped probabilities would not add up to 1, and would be 0; a dropped score is an ordinary one.
    torch.testing.assert_close(noisy.sum(-1), torch.ones(400))
    assert (noisy > 0).all() and not torch.allclose(noisy, clean, atol=1e-3)
    assert next(fusions(prepared(Fusion(adapters=saved()), headed()))).dropout == 0.1
    assert next(fusions(prepared(Fusion(adapters=saved("llama")), headed("llama")))).dropout == 0.0


def test_initialisation(saved):
    for fusion in fusions(prepared(Fusion(adapters=saved()), headed())):
        for weight in (fusion.query_weight, fusion.key_weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(weight.mean()) < 3e-3
        assert fusion.query_bias.eq(0).all() and fusion.key_bias.eq(0).all()
        off = fusion.value_weight.detach()[~torch.eye(32, dtype=torch.bool)]
        assert fusion.value_weight.detach().diagonal().eq(1).all() and off.eq(1e-6).all()


def test_trainable_set(saved, check_training):
    model = headed()
    places = [f"bert.encoder.layer.{i}.output.LayerNorm.adapter" for i in (0, 1)]
    check_training(model, Fusion(adapters=saved()), names_of(model) | {f"{p}.{n}" for p in places for n in TRAINED})


@pytest.mark.parametrize(("family", "head"), CASES)
def test_families_and_heads(saved, family, head, tmp_path):
    model = trained(Fusion(adapters=saved(family)), headed(family, head), rows_for(family, head))
    check_frozen_base(model, headed(family, head))
    for fusion, one in zip(fusions(model), range(2), strict=True):
        kept = [parts_of(adapter, one) for adapter in read_adapters(headed(family), saved(family), "here")]
        assert torch.equal(fusion.down_weight, torch.cat([part[0] for part in kept]))
        assert torch.equal(fusion.up_weight, torch.cat([part[2] for part in kept], 1))
        assert not torch.equal(fusion.value_weight, torch.full((32, 32), 1e-6).fill_diagonal_(1.0))
    check_round_trips(model, family, tmp_path)


def test_size_of_what_is_saved(saved, tmp_path):
    from safetensors.torch import load_file

    model = trained(Fusion(adapters=saved()), headed(), rows_for("bert"))
    check_round_trips(model, "bert", tmp_path)
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    ours = {name: tensor for name, tensor in stored.items() if ".adapter." in name}
    d, sizes = 32, (4, 6, 4)
    adapters = sum(2 * d * r + d + r for r in sizes)
    assert sum(tensor.numel() for tensor in ours.values()) == 2 * (3 * d * d + 2 * d + adapters)
    assert all(n in ours or n.startswith(("bert.pooler.", "classifier.")) for n in stored)


def test_learns_sixteen_examples(saved):
    model, batch, method = headed(), labelled(), Fusion(adapters=saved())
    method.prepare(model, Context())
    freeze_head(model)
    # At 1e-2 it oscillates around the end, and where it stops is the processor's rounding.
    fit(model, [method], [batch], steps=240, learning_rate=3e-3)
    assert accuracy(model, batch) == 1.0


def test_seed_decides(saved):
    def queries(seed):
        model = headed()
        state = torch.get_rng_state()
        Fusion(adapters=saved()).prepare(model, Context(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([fusion.query_weight.flatten() for fusion in fusions(model)])

    assert torch.equal(queries(1), queries(1)) and not torch.equal(queries(1), queries(2))
    assert not torch.equal(*queries(1).view(2, -1)), "every layer is drawn anew"


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_precision_memory_and_nf4(saved, family):
    method = Fusion(adapters=saved(family), dropout=0.0)
    check_checkpointing(method, family)
    check_autocast(method, family)
    check_nf4(method, family)


def test_cached_generation(saved):
    model = shaken(prepared(Fusion(adapters=saved("llama")), tiny("llama")), *ATTENTION)
    ids = padded(1)["input_ids"][:, :4]
    both = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=on, pad_token_id=0) for on in (True, False)
    ]
    assert torch.equal(*both)


def test_bare_is_the_base(saved):
    model = shaken(prepared(Fusion(adapters=saved()), headed()), *ATTENTION)
    with bare():
        assert torch.equal(logits(model, padded()), logits(headed(), padded()))
    assert not torch.allclose(logits(model, padded()), logits(headed(), padded()), atol=1e-2)


def test_compiles(saved):
    model = shaken(prepared(Fusion(adapters=saved()), headed()), *ATTENTION)
    fusion = next(fusions(model))
    x = torch.randn(2, 3, 32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fusion, backend="eager", fullgraph=True)(x), fusion(x))


# What is refused.


def refused(match, model=None, **fields):
    model = headed() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=match):
        Fusion(**fields).prepare(model, Context())
    # Before any work: nothing was frozen, replaced or drawn.
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()


def test_another_base_is_refused(saved, tmp_path):
    other = save_adapter(tmp_path / "other", partial(headed, seed=5))
    refused("trained on another base than the model here", adapters=(other,))
    refused(r"'.*other' was trained on another base than '.*0'", adapters=(saved()[0], other))
    refused("another base", headed(seed=5), adapters=saved())
    # Another head or fewer rows of the vocabulary are no other base.
    Fusion(adapters=saved()).prepare(headed(head="token"), Context())
    assert next(iter(read_adapters(headed(vocab_size=97, num_labels=7), saved(), "x")))


def test_other_folders_are_refused(saved, tmp_path):
    refused("folder '.*nowhere' does not exist", adapters=(str(tmp_path / "nowhere"),))
    houlsby = save_adapter(tmp_path / "houlsby", placement="houlsby")
    refused("holds no adapters of placement pfeiffer", adapters=(houlsby,))
    parallel = save_adapter(tmp_path / "parallel", placement="parallel")
    refused("holds no adapters of placement pfeiffer", adapters=(parallel,))
    stacked = save_adapter(tmp_path / "stacked", stack=saved(number=1))
    refused("holds a stack or an invertible adapter", adapters=(stacked,))
    inverted = save_adapter(tmp_path / "inverted", invertible=True)
    refused("holds a stack or an invertible adapter", adapters=(inverted,))
    tanh = save_adapter(tmp_path / "tanh", activation="tanh")
    refused("has activation 'tanh', .* 'relu'", adapters=(saved()[0], tanh))
    scaled = save_adapter(tmp_path / "scaled", scale=2.0)
    refused("scales its adapters", adapters=(scaled,))


def test_damaged_and_changed_folders_are_refused(tmp_path):
    folder = save_adapter(tmp_path / "a")
    manifest = tmp_path / "a" / "compressft.json"
    values = json.loads(manifest.read_text())
    del values["hash"]
    manifest.write_text(json.dumps({**values, "kind": "model"}))
    refused("is no delta/ folder", adapters=(folder,))
    manifest.write_text(json.dumps({k: v for k, v in values.items() if k != "layers_hash"}))
    refused("written before adapters could be read", adapters=(folder,))
    manifest.write_text(json.dumps(values))
    file = tmp_path / "a" / "delta.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 64
    file.write_bytes(raw)
    refused("its hash is not the recorded one", adapters=(folder,))


def test_adapters_on_changed_weights_are_refused(tmp_path):
    """A run that also pruned or trained layers: its adapters belong to other weights."""
    from compressft.methods.adapter import Adapter
    from compressft.model.saved.delta import save_delta
    from tests.methods.added import backbone_tensors

    model = prepared(Adapter(placement="pfeiffer", size=4), headed())
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    save_delta(model, None, backbone_tensors(headed()), tmp_path / "a", {})
    refused(r"also changes bert\.encoder\.layer\.0\.attention\.self\.query\.weight", adapters=(str(tmp_path / "a"),))


def test_fields_and_partners(saved):
    with pytest.raises(ValidationError):
        Fusion()
    with pytest.raises(ValidationError):
        Fusion(adapters=())
    with pytest.raises(ValidationError):
        Fusion(adapters=("a",), dropout=1.0)
    for cuts in (Depth(keep=[1]), ZipLM(target={"sparsity": 0.4})):
        reason = conflict([Fusion(adapters=("a",)), cuts])
        assert f"pass '{cuts.type}' removes" in reason and "in a stage after this one" in reason
    for beside in (Vocabulary(), Structured(ffn=0.5)):
        assert conflict([Fusion(adapters=("a",)), beside]) is None
    model = prepared(Fusion(adapters=saved()), headed())
    with pytest.raises(UserError, match="an earlier stage left adapters"):
        Fusion(adapters=saved()).prepare(model, Context())
    with pytest.raises(UserError, match="cannot be made narrower"):
        Structured(hidden=0.5, align_hidden=8).prepare(model, Context())


def test_no_gradient_beyond_what_is_trained(saved):
    model = prepared(Fusion(adapters=saved()), headed()).train()
    model(**labelled(4)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert len(list(trainable(model))) == 2 * 5 + 4


def test_batch_of_another_family_is_plain(saved):
    model = prepared(Fusion(adapters=saved("roberta")), headed("roberta"))
    assert torch.isfinite(logits(model, batch_for("roberta"))).all()
