"""The int8 pass: layers, phases, tables and exclusions, alone and together with pruning and distillation."""

import pytest
import torch

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.linear import CompressedLinear, dense
from compressft.modules.quantizer import Int8Quantizer
from compressft.objectives.distill import Distill
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.transform import Context
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny

LAYER = "bert.encoder.layer"
PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
ALL = {f"{LAYER}.{i}.{path}" for i in (0, 1) for path in PARTS.values()} | {"bert.pooler.dense"}
TABLES = {f"bert.embeddings.{name}_embeddings" for name in ("word", "position", "token_type")}


def quantised(model):
    return {n.removesuffix(".quantizer") for n, m in model.named_modules() if isinstance(m, Int8Quantizer)}


def embedded(model):
    return {n for n, m in model.named_modules() if isinstance(m, CompressedEmbedding)}


def prepared(one, family="bert", **settings):
    model = tiny(family, **settings)
    one.prepare(model, Context())
    return model


def test_everything_but_the_head():
    model = prepared(Int8())
    assert quantised(model) == ALL and embedded(model) == TABLES
    assert type(model.classifier) is torch.nn.Linear


@pytest.mark.parametrize("role", PARTS)
def test_exclude_a_role(role):
    gone = {f"{LAYER}.{i}.{PARTS[role]}" for i in (0, 1)}
    assert quantised(prepared(Int8(exclude=(role,)))) == ALL - gone


def test_exclude_pooler_embeddings_and_single_modules():
    one = f"{LAYER}.1.output.dense"
    model = prepared(Int8(exclude=("pooler", "embeddings", one)))
    assert quantised(model) == ALL - {"bert.pooler.dense", one} and embedded(model) == set()
    assert embedded(prepared(Int8(embeddings=False))) == set()
    model = prepared(Int8(exclude=("bert.pooler.dense", "bert.embeddings.word_embeddings")))
    assert quantised(model) == ALL - {"bert.pooler.dense"}
    assert embedded(model) == TABLES - {"bert.embeddings.word_embeddings"}


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_fused_projection_is_excluded_with_any_of_its_parts(part):
    fused = {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}
    assert quantised(prepared(Int8(), "gpt2")) - quantised(prepared(Int8(exclude=(part,)), "gpt2")) == fused


def test_tables_in_four_bits_or_not_at_all():
    model = prepared(Int8(embeddings="int4", embedding_block=64))
    tables = {n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, CompressedEmbedding)}
    assert (tables["word_embeddings"].bits, tables["word_embeddings"].block) == (4, 64)
    assert tables["position_embeddings"].bits == tables["token_type_embeddings"].bits == 8
    assert embedded(model) == TABLES and embedded(prepared(Int8(embeddings="none"))) == set()
    assert Int8(embeddings=True) == Int8(embeddings="int8") and Int8(embeddings=False) == Int8(embeddings="none")


def test_exclude_refuses_what_does_not_exist():
    with pytest.raises(UserError, match=r"int8\.exclude: 'poler' is neither .* \(did you mean 'pooler'\?\)"):
        prepared(Int8(exclude=("poler",)))


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("ranges", ["static", "dynamic", "learned"])
def test_every_family_stays_close_to_its_float_model(family, ranges):
    batch = batch_for(family)
    want = logits(tiny(family), batch)
    one = Int8(ranges=ranges)
    model = prepared(one, family)
    parts = anatomy(model)
    assert len(quantised(model)) >= len(parts.layers) * len(parts.layers[0].linears)
    assert len(embedded(model)) == len(parts.family.embedding_tables)
    # Ranges are learned in training mode; dropout is off so that the two can be compared.
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.train()
    logits(model, batch)
    model.eval()
    one.finalize(model)
    got = logits(model, batch)
    assert not torch.equal(got, want)
    assert (got - want).norm() < 0.1 * want.norm()
    with dense():
        torch.testing.assert_close(logits(model, batch), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("progress", "active", "observing"),
    [
        (0.0, False, True),
        (0.29, False, True),
        (0.3, True, True),
        (0.69, True, True),
        (0.7, True, False),
        (1.0, True, False),
    ],
)
def test_phases_are_functions_of_progress(progress, active, observing):
    one = Int8(start=0.3, freeze=0.7)
    model = prepared(one)
    for other in (1.0, 0.0, 0.5):
        one.after_step(model, other)
    one.after_step(model, progress)
    modules = [m for m in model.modules() if isinstance(m, Int8Quantizer)]
    assert len(modules) == 13
    assert all((m.active, m.observing) == (active, observing) for m in modules)
    assert all(m.active == active for m in model.modules() if isinstance(m, CompressedEmbedding))
    assert one.status(model, progress)["bits"]["now"] == (8.0 if active else 32.0)


def test_ranges_learn_before_the_start_and_stop_at_freeze():
    one = Int8(start=0.5, freeze=0.75)
    model = prepared(one)
    fit(model, [one], [labelled()], steps=8)
    batches = {int(m.batches) for m in model.modules() if isinstance(m, Int8Quantizer)}
    # Steps 1 to 6 run at progress 0 to 5 / 8, the seventh at 6 / 8 = freeze.
    assert batches == {6}


def test_learned_ranges_have_their_own_learning_rate_and_no_decay():
    one = Int8(ranges="learned", range_learning_rate=0.02)
    model = prepared(one)
    (group,) = one.param_groups(model, Context())
    assert len(group["params"]) == 26 and (group["lr"], group["weight_decay"]) == (0.02, 0.0)
    assert Int8().param_groups(prepared(Int8()), Context()) == []
    fit(model, [one], [labelled()], steps=30)
    quantizers = [m for m in model.modules() if isinstance(m, Int8Quantizer)]
    frozen = [float(q.high.detach()) for q in quantizers]
    one.finalize(model)
    assert one.param_groups(model, Context()) == [] and [float(q.high) for q in quantizers] == frozen


def test_learned_ranges_move_until_freeze():
    one = Int8(ranges="learned", freeze=0.8)
    model = prepared(one)
    fit(model, [one], [labelled()], steps=20)
    quantizer = next(m for m in model.modules() if isinstance(m, Int8Quantizer))
    # Sixteen batches for the start and at most the rest by gradient: here freeze comes first.
    assert int(quantizer.batches) == 16 and quantizer.high.grad is None
    longer = Int8(ranges="learned", freeze=0.9)
    model = prepared(longer)
    fit(model, [longer], [labelled()], steps=30)
    averaged = Int8(ranges="learned", freeze=16 / 30)
    other = prepared(averaged)
    fit(other, [averaged], [labelled()], steps=30)
    ends = [[float(q.high.detach()) for q in m.modules() if isinstance(q, Int8Quantizer)] for m in (model, other)]
    assert all(a != b for a, b in zip(*ends, strict=True))


def test_finalize_ships_int8():
    one = Int8(start=0.5)
    model, batch = prepared(one), labelled()
    fit(model, [one], [batch], steps=4)
    want = logits(model, batch)
    one.after_step(model, 0.0)
    assert not torch.equal(logits(model, batch), want)
    one.finalize(model)
    assert torch.equal(logits(model, batch), want)
    assert not any(m.observing for m in model.modules() if isinstance(m, Int8Quantizer))


def test_refused_when_ranges_would_never_be_learned():
    assert "is not after int8.start 0.5" in Int8(start=0.5, freeze=0.5).check()
    assert Int8().check() is None
    assert "'qdq' needs fixed ranges" in Int8(format="qdq", ranges="dynamic").check()
    assert "noise" in Int8(start=0.5, noise=0.2).check()


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "gpt2", "qwen3"])
@pytest.mark.parametrize("ranges", ["static", "dynamic", "learned"])
def test_joint_run_ships_what_it_trained(family, ranges):
    """Prune, quantise and distil from the same weights at once: finalize changes the logits by rounding only."""
    model = tiny(family, architecture="GPT2ForSequenceClassification" if family == "gpt2" else None)
    batch = labelled()
    transforms = [
        Distill(teacher="self", hidden=0.1),
        Structured(heads=0.5, ffn=0.5, align=4, floor_ffn=4, start=0.0, end=0.5),
        Int8(ranges=ranges, start=0.2, freeze=0.8, noise=0.6 if ranges == "learned" else 0.0),
    ]
    for transform in transforms:
        transform.prepare(model, Context())
    fit(model, transforms, [batch, labelled(seed=2)], steps=10)
    want, total = logits(model, batch), sum(p.numel() for p in model.parameters())
    for transform in transforms:
        transform.finalize(model)
    got = logits(model, batch)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * total
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
