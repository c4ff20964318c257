"""What holds for every method: it can learn, it is repeatable, and it works for other families."""

import pytest
import torch

from compressft.methods import METHODS
from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.methods.head_gates import HeadGates
from compressft.methods.mask import Mask
from compressft.methods.prefix import PrefixTuning
from compressft.methods.probe import Probe
from compressft.methods.side import Side
from compressft.model.count import count
from compressft.transform import Context
from tests.methods.added import freeze_head
from tests.settings import made
from tests.share import drawn
from tests.tiny import accuracy, fit, labelled, logits, tiny

# What needs saved adapters of the very model has all of this in its own tests.
ELSEWHERE = {"fusion"}
ROWS = {name: made(name) for name in METHODS if name not in ELSEWHERE}
VARIANTS = {
    "full, frozen embeddings": Full(freeze_embeddings=True),
    "pfeiffer": Adapter(placement="pfeiffer", reduction_factor=4),
    "parallel": Adapter(placement="parallel", reduction_factor=4),
    "ladder": Side(network="ladder", size=8),
    "mlp probe": Probe(head="mlp"),
    "bilstm probe": Probe(head="bilstm"),
    "prefix, its keys and values": PrefixTuning(length=3, reparameterise=False),
    "mask, masked head": Mask(head="masked"),
    "supermask": Mask(preset="supermask"),
    "noisy head gates": HeadGates(),
    "head importance, frozen": HeadGates(decide="importance", heads=0.5, weights="frozen"),
}
CASES = {**ROWS, **VARIANTS}
# What trains little or nothing but the head; of all others the head is frozen where they have to learn.
HEAD = {"probe", "layers", "mlp probe", "bilstm probe", "scalar_mix", "head importance, frozen"}


@pytest.mark.dear
@pytest.mark.parametrize("name", [*ROWS, *drawn(2, VARIANTS)])
def test_learns_sixteen_examples(name):
    model, batch = tiny(), labelled()
    CASES[name].prepare(model, Context())
    if name not in HEAD:
        freeze_head(model)
    before = accuracy(model, batch)
    for _ in range(8):
        fit(model, [CASES[name]], [batch], steps=40, learning_rate=1e-2)
        if accuracy(model, batch) == 1.0:
            break
    assert before < 1.0 and accuracy(model, batch) == 1.0


@pytest.mark.dear
@pytest.mark.parametrize("name", CASES)
def test_same_seed_same_result(name):
    results = []
    for _ in range(2):
        model = tiny()
        CASES[name].prepare(model, Context(seed=3))
        fit(model, [CASES[name]], [labelled()], steps=3)
        results.append(logits(model, labelled(4, seed=8)))
    assert torch.equal(*results)


# What is drawn at the start, by a part of its names; the other methods' own tests look at theirs.
DRAWN = {
    "peft": "lora_A",
    "ladder": ".side.",
    "noisy head gates": ".noise",
    "mlp probe": "probe_head",
    "language": "invertible",
}


@pytest.mark.parametrize("name", DRAWN)
def test_another_seed_draws_other_values(name):
    first, again, other = (tiny() for _ in range(3))
    method = {**CASES, "language": Adapter(placement="pfeiffer", invertible=True)}[name]
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        method.prepare(model, Context(seed=seed))
    one, same, two = (model.state_dict() for model in (first, again, other))
    assert all(torch.equal(same[n], value) for n, value in one.items())
    assert any(DRAWN[name] in n and not torch.equal(two[n], value) for n, value in one.items())


def test_the_papers_settings_are_the_defaults():
    model = tiny()
    Adapter(placement="pfeiffer", invertible=True).prepare(model, Context())
    assert model.bert.invertible.f[0].out_features == 32 // 2 // 2
    assert PrefixTuning().length == 10
    for preset, share in (("masking", 0.05), ("supermask", 0.3)):
        model, method = tiny(), Mask(preset=preset)
        method.prepare(model, Context())
        assert method.status(model, 0.0)["masked"]["now"] == pytest.approx(share, abs=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_prepare_leaves_the_global_generator_alone(name):
    torch.manual_seed(4)
    state = torch.get_rng_state()
    model = tiny()
    torch.manual_seed(4)
    CASES[name].prepare(model, Context(seed=3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", ["distilbert", "electra", "roberta", "gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("name", CASES)
def test_works_for_other_families(family, name):
    causal = {"gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification"}
    model, batch = tiny(family, architecture=causal.get(family)), labelled(4)
    if family == "roberta":
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    CASES[name].prepare(model, Context())
    before = logits(model, batch)
    fit(model, [CASES[name]], [batch], steps=2)
    after = logits(model, batch)
    assert after.shape == (4, 3) and not torch.equal(after, before)
    assert 0 < count(model)["trainable"] <= count(model)["total"]
