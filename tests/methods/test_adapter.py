"""Adapters: near-identity, exact identity with a zero up-projection, formulas in place, trainable sets; MAD-X."""

from collections import Counter
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy
from compressft.model.count import count
from compressft.model.saved.adapters import read_adapters, swap_adapter
from compressft.model.surgery import adapter_in
from compressft.modules.bottleneck import Stack, links
from compressft.modules.linear import bare
from compressft.passes.depth import Depth
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
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
    headed,
    names_of,
    rows_for,
    save_adapter,
    shaken,
    trained,
)
from tests.tiny import TINY, batch_for, fit, labelled, logits, padded, tiny

HOULSBY = Adapter(placement="houlsby", size=8)
PFEIFFER = Adapter(placement="pfeiffer", size=8)
PARALLEL = Adapter(placement="parallel", size=8)


def prepared(method, family="bert", **settings):
    model = tiny(family, **settings)
    method.prepare(model, Context())
    return model


def zero_up(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter.up_" in name:
                parameter.zero_()


@pytest.mark.parametrize("family", TINY)
def test_houlsby_starts_near_identity(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(Adapter(), family)
    got = logits(model, batch)
    assert not torch.equal(got, want)
    assert (got - want).norm() < 1e-3 * want.norm()
    zero_up(model)
    # GPT-2's output projection computes its product in another order once it is a CompressedLinear.
    tolerance = 1e-5 if family == "gpt2" else 0
    torch.testing.assert_close(logits(model, batch), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", TINY)
def test_pfeiffer_with_zero_up_is_exact(family):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    model = prepared(PFEIFFER, family)
    assert not torch.equal(logits(model, batch), want)
    zero_up(model)
    assert torch.equal(logits(model, batch), want)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def layer_norms(model):
    with Count() as counted:
        logits(model, padded())
    return counted.calls[torch.ops.aten.native_layer_norm]


def test_pfeiffer_applies_the_layer_norm_twice():
    assert layer_norms(tiny()) == 5
    assert layer_norms(prepared(PFEIFFER)) == 5 + 2
    assert layer_norms(prepared(HOULSBY)) == 5


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_one_block_changes_only_what_comes_after(family, placement):
    model = prepared(Adapter(placement=placement, size=8), family)
    batch = batch_for(family)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))

    def states():
        with torch.no_grad():
            return model(**batch, output_hidden_states=True).hidden_states

    before = states()
    with torch.no_grad():
        for name, parameter in anatomy(model).layers[1].module.named_parameters():
            if "adapter." in name:
                parameter.zero_()
    after = states()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2], atol=1e-3)


def test_pre_norm_pfeiffer_adds_to_the_ffn_output():
    """In a pre-norm layer: h + f + up(act(down(f))), f the FFN's output."""
    plain, model = tiny("llama"), prepared(PFEIFFER, "llama")
    ffn, after = {}, {}
    plain.model.layers[0].mlp.register_forward_hook(lambda m, a, out: ffn.setdefault("f", out))
    model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: after.setdefault("f", out))
    logits(plain, padded())
    logits(model, padded())
    adapter = model.model.layers[0].mlp.down_proj.adapter
    f = ffn["f"]
    want = f + torch.relu(f @ adapter.down_weight.t() + adapter.down_bias) @ adapter.up_weight.t() + adapter.up_bias
    torch.testing.assert_close(after["f"], want.detach(), atol=1e-5, rtol=1e-5)


HEAD = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
PARTS = ("down_weight", "down_bias", "up_weight", "up_bias")


def test_houlsby_trainable_set(check_training):
    layer = "bert.encoder.layer"
    places = [f"{layer}.{i}.{place}.dropout.adapter" for i in (0, 1) for place in ("attention.output", "output")]
    norms = ["bert.embeddings", *(f"{layer}.{i}.{place}" for i in (0, 1) for place in ("attention.output", "output"))]
    expected = HEAD | {f"{place}.{part}" for place in places for part in PARTS}
    expected |= {f"{norm}.LayerNorm.{part}" for norm in norms for part in ("weight", "bias")}
    check_training(tiny(), HOULSBY, expected)


def test_pfeiffer_trainable_set(check_training):
    places = [f"bert.encoder.layer.{i}.output.LayerNorm.adapter" for i in (0, 1)]
    check_training(tiny(), PFEIFFER, HEAD | {f"{place}.{part}" for place in places for part in PARTS})


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 5), ("qwen3", 9), ("gpt2", 10), ("distilbert", 10), ("t5", 12), ("bart", 24)]
)
def test_houlsby_trains_every_norm_of_other_families(family, norms):
    model = prepared(HOULSBY, family)
    names = [n for n, _ in trainable(model) if "norm" in n.lower() or ".ln_" in n]
    assert len(names) == norms


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("method", [HOULSBY, PFEIFFER])
def test_parameter_count(family, method):
    d, m = 32, 8
    bottlenecks = 2 * (2 if method is HOULSBY else 1)
    model = prepared(method, family)
    assert count(model)["total"] == count(tiny(family))["total"] + bottlenecks * (2 * d * m + d + m)


def test_sizes():
    assert Adapter().bottleneck_size(768) == 64
    assert Adapter(placement="pfeiffer").bottleneck_size(768) == 48
    assert Adapter(reduction_factor=4).bottleneck_size(768) == 192
    assert Adapter(placement="pfeiffer", size=5).bottleneck_size(768) == 5
    with pytest.raises(UserError, match=r"method\.reduction_factor: 5 does not divide the hidden size 768"):
        Adapter(reduction_factor=5).bottleneck_size(768)
    with pytest.raises(ValidationError, match="both set; give one"):
        Adapter(size=4, reduction_factor=4)


def test_initialisation_and_activation_follow_the_placement():
    houlsby, pfeiffer = prepared(Adapter(size=64)), prepared(Adapter(placement="pfeiffer", size=64))
    first = houlsby.bert.encoder.layer[0].output.dropout.adapter
    second = pfeiffer.bert.encoder.layer[0].output.LayerNorm.adapter
    assert first.activation == "gelu_tanh" and first.down_weight.abs().max() <= 2e-3
    assert second.activation == "relu" and second.down_weight.std().item() == pytest.approx(0.02, rel=0.1)
    other = prepared(Adapter(size=4, activation="silu")).bert.encoder.layer[0].output.dropout.adapter
    assert other.activation == "silu"


def test_seed_decides_the_adapters():
    def weights(seed):
        model = tiny()
        HOULSBY.prepare(model, Context(seed=seed))
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".adapter." in n])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    first = weights(1).view(4, -1)
    assert not torch.equal(first[0], first[1]), "every adapter is drawn anew"


# Parallel.


@pytest.mark.parametrize("family", TINY)
def test_parallel_starts_as_the_identity(family):
    batch = batch_for(family)
    model = prepared(PARALLEL, family)
    assert torch.equal(logits(model, batch), logits(tiny(family), batch))
    assert not torch.equal(logits(shaken(model, ".parallel."), batch), logits(tiny(family), batch))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "llama", "qwen3", "gpt2"])
def test_parallel_reads_what_the_ffn_reads(family):
    """He et al.: ffn(x) + 4 up(relu(down(x))); in BERT's layers x is the residual, too."""
    plain, model = tiny(family), shaken(prepared(PARALLEL, family), ".parallel.")
    layers = [anatomy(one).layers[0] for one in (plain, model)]
    a = layers[1].module.parallel
    x = torch.randn(2, 5, 32)
    adapted = 4 * (torch.relu(x @ a.down_weight.t() + a.down_bias) @ a.up_weight.t() + a.up_bias)
    if layers[0].family.up == ("intermediate.dense",):
        ffn = [layer.module.output(layer.module.intermediate(x), x) for layer in layers]
        f = plain_output(layers[0].module, x)
        want = layers[0].module.output.LayerNorm(f + x + adapted)
    else:
        name = "ffn" if family == "distilbert" else "mlp"
        ffn = [getattr(layer.module, name)(x) for layer in layers]
        want = ffn[0] + adapted
    torch.testing.assert_close(ffn[1], want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ffn[0], ffn[1], atol=1e-2)


def plain_output(layer, x):
    return layer.output.dense(layer.intermediate(x))


def test_parallel_trainable_set_and_size(check_training):
    expected = HEAD | {f"bert.encoder.layer.{i}.parallel.{part}" for i in (0, 1) for part in PARTS}
    check_training(tiny(), PARALLEL, expected, steps=4)
    assert count(prepared(PARALLEL))["total"] == count(tiny())["total"] + 2 * (2 * 32 * 8 + 32 + 8)
    assert Adapter(placement="parallel").bottleneck_size(768) == 384


@pytest.mark.parametrize("method", [HOULSBY, PFEIFFER, PARALLEL], ids=lambda method: method.placement)
def test_gradients_through_the_layer_above(method):
    model = prepared(method)
    check_gradients(shaken(model, ".adapter.", ".parallel."), labelled(4), "encoder.layer.0.")


def test_scale_and_initialisation_can_be_set():
    model = prepared(Adapter(placement="pfeiffer", size=8, init="zero", scale=3.0))
    adapter = model.bert.encoder.layer[0].output.LayerNorm.adapter
    assert adapter.scale == 3.0 and torch.equal(logits(model, padded()), logits(tiny(), padded()))
    assert adapter.down_weight.abs().max() <= 32**-0.5 and adapter.down_weight.std().item() > 0.08
    x = torch.randn(2, 32)
    with torch.no_grad():
        adapter.up_weight.normal_()
        inner = torch.relu(x @ adapter.down_weight.t()) @ adapter.up_weight.t()
        torch.testing.assert_close(adapter(x), x + 3 * inner, atol=1e-4, rtol=1e-4)
    houlsby = prepared(Adapter(placement="parallel", init="houlsby", scale=1.0))
    assert houlsby.bert.encoder.layer[0].parallel.up_weight.abs().max() <= 2e-3


# MAD-X: stacks and invertible adapters.


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """Two language adapters of each family, with invertible adapters or without."""
    made = {}

    def folders(family="bert", invertible=False):
        if (family, invertible) not in made:
            root = tmp_path_factory.mktemp(family)
            base = partial(headed, family)
            made[family, invertible] = [
                save_adapter(root / str(i), base, seed=i, size=6, invertible=invertible) for i in (0, 1)
            ]
        return made[family, invertible]

    return folders


def stacked(folders, family="bert", **fields):
    model = headed(family)
    method = Adapter(placement="pfeiffer", size=4, stack=tuple(folders), **fields)
    method.prepare(model, Context())
    return model


@torch.no_grad()
def test_a_stack_in_a_post_norm_layer(languages):
    """The library's composition: each adapter reads LN of what the one below wrote, plus h; LN once more at the end."""
    model = stacked(languages()[:1])
    norm, own = model.bert.encoder.layer[1].output.LayerNorm, headed().bert.encoder.layer[1].output.LayerNorm
    lower, upper = links(norm.adapter)
    f, h = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    z = f + h
    for adapter in (lower, upper):
        x = own(f + h)
        f = torch.relu(x @ adapter.down_weight.t() + adapter.down_bias) @ adapter.up_weight.t() + adapter.up_bias + f
    torch.testing.assert_close(norm(z), own(f + h), atol=1e-5, rtol=1e-5)
    saved = read_adapters(headed(), languages()[:1], "here")[0].layers[1][0]
    assert torch.equal(lower.down_weight, saved.down_weight) and lower.down_weight.shape == (6, 32)
    assert layer_norms(model) == 5 + 2 * 2


@torch.no_grad()
def test_a_stack_in_a_pre_norm_layer(languages):
    model, plain = stacked(languages("llama")[:1], "llama"), headed("llama")
    x = torch.randn(2, 3, 32)
    f = plain.model.layers[0].mlp(x)
    for a in links(model.model.layers[0].mlp.down_proj.adapter):
        f = f + torch.relu(f @ a.down_weight.t() + a.down_bias) @ a.up_weight.t() + a.up_bias
    torch.testing.assert_close(model.model.layers[0].mlp(x), f, atol=1e-4, rtol=1e-4)


def test_order_of_a_stack_matters(languages):
    first, second = (stacked(order) for order in (languages(), languages()[::-1]))
    assert not torch.allclose(logits(first, padded()), logits(second, padded()), atol=1e-3)


def test_stack_trainable_set(languages, check_training):
    places = [f"bert.encoder.layer.{i}.output.LayerNorm.adapter.1" for i in (0, 1)]
    expected = HEAD | {f"{place}.{part}" for place in places for part in PARTS}
    check_training(headed(), Adapter(placement="pfeiffer", size=4, stack=tuple(languages()[:1])), expected)


@pytest.mark.parametrize(("family", "head"), CASES)
@pytest.mark.parametrize("kind", ["parallel", "stack"])
def test_families_and_heads(languages, family, head, kind, tmp_path):
    if kind == "parallel":
        method = Adapter(placement="parallel", size=4)
    else:
        method = Adapter(placement="pfeiffer", size=4, stack=tuple(languages(family, True)[:1]))
    model = shaken(trained(method, headed(family, head), rows_for(family, head)), ".parallel.")
    check_frozen_base(model, headed(family, head))
    check_round_trips(model, family, tmp_path)


def test_swapping_the_language(languages):
    """MAD-X, step 3: another language below the same task adapter."""
    task = stacked(languages(invertible=True)[:1])
    want = stacked(languages(invertible=True)[1:])
    with torch.no_grad():
        for name, tensor in trainable(task):
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
            want.get_parameter(name).copy_(tensor)
    before = {name: value.clone() for name, value in trainable(task)}
    assert not torch.allclose(logits(task, padded()), logits(want, padded()), atol=1e-3)
    swap_adapter(task, languages(invertible=True)[1])
    assert torch.equal(logits(task, padded()), logits(want, padded()))
    assert all(torch.equal(value, before[name]) for name, value in trainable(task))
    swap_adapter(task, languages(invertible=True)[0])
    assert not torch.equal(logits(task, padded()), logits(want, padded()))
    with pytest.raises(UserError, match=r"only one of .* has an invertible adapter"):
        swap_adapter(task, languages()[0])
    with pytest.raises(UserError, match="no stack of adapters with position 2"):
        swap_adapter(task, languages(invertible=True)[0], position=2)
    with pytest.raises(UserError, match="no stack of adapters with position 0"):
        swap_adapter(headed(), languages()[0])


def test_a_second_stage_stacks_on_the_first():
    """What an earlier stage trained keeps acting, frozen."""
    for method, holder in ((PFEIFFER, "output.LayerNorm"), (HOULSBY, "output.dropout")):
        model = shaken(prepared(method), ".adapter.")
        want = logits(model, padded())
        method.prepare(model, Context(seed=1))
        place = model.bert.encoder.layer[0].get_submodule(holder).adapter
        assert isinstance(place, Stack) and len(links(place)) == 2
        zero = [name for name, _ in trainable(model) if ".adapter.1.up_" in name]
        assert len(zero) == (4 if method is PFEIFFER else 8)
        assert not any(".adapter.0." in name for name, _ in trainable(model))
        with torch.no_grad():
            for name in zero:
                model.get_parameter(name).zero_()
        torch.testing.assert_close(logits(model, padded()), want, atol=1e-5, rtol=1e-5)


LANGUAGE_MODELS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "electra": "ElectraForMaskedLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
LANGUAGE = Adapter(placement="pfeiffer", reduction_factor=2, invertible=True)


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_a_language_adapter_around_a_language_model(family, tmp_path):
    from compressft.model.saved.compressed import load_compressed, save_compressed

    model = tiny(family, architecture=LANGUAGE_MODELS[family], tie_word_embeddings=True)
    LANGUAGE.prepare(model, Context())
    width = 16 if family == "electra" else 32
    seen = []
    # Hooks run in the order in which they were put in: this one sees what the inverse made.
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    shaken(model, "invertible.")
    got = logits(model, batch_for(family))
    assert seen[0].shape[-1] == width == model.base_model.invertible.width
    names = {name for name, _ in trainable(model)}
    assert {f"{model.base_model_prefix}.invertible.{half}.{i}.weight" for half in "fg" for i in (0, 1)} <= names
    assert not any("word_embeddings" in name or "embed_tokens" in name or "wte" in name for name in names)
    with bare():
        assert torch.equal(
            logits(model, batch_for(family)),
            logits(tiny(family, architecture=LANGUAGE_MODELS[family], tie_word_embeddings=True), batch_for(family)),
        )
    save_compressed(model, None, tmp_path / "model", {})
    assert torch.equal(logits(load_compressed(tmp_path / "model"), batch_for(family)), got)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_forward_and_inverse_cancel_without_layers(family):
    """No layers, nothing between them and the output embedding: the logits are the base's."""

    def without_layers():
        model = tiny(family, architecture=LANGUAGE_MODELS[family])
        if family == "bert":
            model.bert.encoder.layer = torch.nn.ModuleList()
            model.cls.predictions.transform = torch.nn.Identity()
            return model
        for layer in anatomy(model).layers:
            with torch.no_grad():
                for path in (layer.family.o, layer.family.down):
                    for parameter in layer.part(path).parameters():
                        parameter.zero_()
        setattr(model.base_model, anatomy(model).family.final_norm, torch.nn.Identity())
        return model

    model = tiny(family, architecture=LANGUAGE_MODELS[family])
    LANGUAGE.prepare(model, Context())
    coupling = shaken(model.base_model.invertible, ".weight", ".bias", "weight")
    bald = without_layers()
    want = logits(bald, batch_for(family))
    from compressft.modules.invertible import add_invertible

    add_invertible(bald, coupling)
    states = []
    bald.get_output_embeddings().register_forward_pre_hook(lambda m, args: states.append(args[0]))
    torch.testing.assert_close(logits(bald, batch_for(family)), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(coupling(states[0]), states[0], atol=1e-2)


def test_generation_with_a_cache():
    for method in (PARALLEL, LANGUAGE):
        for family in ("llama", "gpt2"):
            model = shaken(prepared(method, family), ".parallel.", "invertible.", ".adapter.")
            ids = padded(2, 5)["input_ids"][:1]
            both = [
                model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=on, pad_token_id=0)
                for on in (True, False)
            ]
            assert torch.equal(*both)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["parallel", "madx"])
def test_precision_memory_and_nf4(languages, family, kind):
    method = PARALLEL
    if kind == "madx":
        method = Adapter(placement="pfeiffer", size=4, stack=tuple(languages(family)[:1]), invertible=True)
    check_checkpointing(method, family)
    check_autocast(method, family)
    check_nf4(method, family)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hidden_dimensions_leave_stacks_and_parallel_adapters(languages, family):
    """Pruning of the stream reaches every adapter: settling changes no logit."""
    hidden = Structured(hidden=0.5, align_hidden=8, start=0.0, end=0.5)
    for method in (PARALLEL, Adapter(placement="pfeiffer", size=4, stack=tuple(languages(family)[:1]))):
        model, batch = headed(family), rows_for(family)
        for transform in (method, hidden):
            transform.prepare(model, Context([method, hidden]))
        fit(model, [method, hidden], [batch], 4)
        before = logits(model, batch)
        for transform in (method, hidden):
            transform.finalize(model)
        assert anatomy(model).width == 16
        torch.testing.assert_close(logits(model, batch), before, atol=1e-4, rtol=1e-4)


def test_invertible_adapters_and_quantised_tables():
    """The pass that replaces embedding tables does not replace what stands behind them."""
    for family in ("bert", "gpt2"):
        model = headed(family)
        method, int8 = LANGUAGE, Int8()
        for transform in (method, int8):
            transform.prepare(model, Context([method, int8]))
        shaken(model, "invertible.")
        fit(model, [method, int8], [rows_for(family)], 2)
        got = logits(model, rows_for(family))
        with torch.no_grad():
            for parameter in model.base_model.invertible.parameters():
                parameter.zero_()
        assert not torch.allclose(logits(model, rows_for(family)), got, atol=1e-3)


# What is refused.


def test_stacks_that_are_refused(languages, tmp_path):
    with pytest.raises(ValidationError, match="stack lies in Pfeiffer's place, placement is 'houlsby'"):
        Adapter(stack=("a",))
    with pytest.raises(UserError, match="there can be one invertible adapter"):
        stacked(languages(invertible=True))
    with pytest.raises(UserError, match="there can be one invertible adapter"):
        stacked(languages(invertible=True)[:1], invertible=True)
    with pytest.raises(UserError, match=r"method adapter\.stack: folder .* does not exist"):
        stacked([str(tmp_path / "none")])
    other = save_adapter(tmp_path / "other", partial(headed, seed=9))
    with pytest.raises(UserError, match="was trained on another base"):
        stacked([other])
    assert "removes layers" in conflict([Adapter(placement="pfeiffer", stack=("a",)), Depth(keep=[0])])
    assert conflict([Adapter(), Depth(keep=[0])]) is None


def test_places_that_are_refused():
    model = prepared(PARALLEL)
    with pytest.raises(UserError, match="an earlier stage put parallel adapters there"):
        PARALLEL.prepare(model, Context())
    layers = Structured(layers=0.5)
    with pytest.raises(UserError, match="sits in front of the first layer"):
        LANGUAGE.prepare(tiny("llama"), Context([LANGUAGE, layers]))
    LANGUAGE.prepare(tiny(), Context([LANGUAGE, layers]))


def test_names_of_a_language_adapter_in_a_task_model():
    model = prepared(LANGUAGE)
    assert {name for name, _ in trainable(model)} == names_of(model, ".adapter.", "invertible.")
    assert adapter_in(model, anatomy(model).layers[0]) is not None
    assert not hasattr(model, "inverse")


def test_encoder_decoders():
    """T5's FFN is a module, BART's is not; what reads one stack of layers says so."""
    from compressft.methods.fusion import Fusion
    from compressft.methods.probe import Probe
    from compressft.methods.scalar_mix import ScalarMix
    from compressft.methods.side import Side

    model, plain = tiny("t5"), tiny("t5")
    PARALLEL.prepare(model, Context())
    batch = {**padded(), "decoder_input_ids": padded(seed=3)["input_ids"]}
    assert torch.equal(logits(model, batch), logits(plain, batch))
    assert not torch.allclose(logits(shaken(model, ".parallel."), batch), logits(plain, batch), atol=1e-3)
    with pytest.raises(UserError, match="'parallel' wants an FFN that is a module"):
        PARALLEL.prepare(tiny("bart"), Context())
    one_stack = [LANGUAGE, Adapter(placement="pfeiffer", stack=("a",)), Fusion(adapters=("a",)), ScalarMix(), Side()]
    for method in (*one_stack, Probe(head="mlp"), Probe(features="scalar_mix")):
        with pytest.raises(UserError, match="encoder-decoder"):
            method.prepare(tiny("t5"), Context())
