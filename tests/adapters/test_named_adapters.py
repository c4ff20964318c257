"""Several methods on one base from Python: each is what it would be alone, and the base is nobody's to change."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

from compressft import get_model
from compressft.adapters.named_adapters import Adapted
from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.methods.adapter import Adapter
from compressft.transform import Context, trainable
from tests.share import drawn
from tests.tiny import fit, labelled, logits, padded, tiny

LORA = {"type": "peft", "config": {"peft_type": "LORA", "r": 4}}
SMALL = {"type": "adapter", "size": 4}


def two():
    """A base with LoRA and a bottleneck adapter, both trained."""
    base = tiny()
    adapted = get_model(base, LORA, "one")
    adapted.add_adapter("two", SMALL, seed=1)
    for name in ("one", "two"):
        adapted.set_adapter(name)
        fit(adapted.model, [adapted.methods[name]], [labelled(4)], 3, learning_rate=5e-2)
    return base, adapted


def test_each_is_what_it_is_alone():
    _, adapted = two()
    alone = tiny()
    method = Adapter(size=4)
    method.prepare(alone, Context(seed=1))
    fit(alone, [method], [labelled(4)], 3, learning_rate=5e-2)
    batch = labelled(4, seed=5)
    assert torch.equal(logits(adapted, batch), logits(alone, batch))
    adapted.set_adapter("one")
    assert not torch.equal(logits(adapted, batch), logits(alone, batch))


def test_the_base_stays_as_it_was():
    base, adapted = two()
    batch = labelled(4)
    fresh = logits(tiny(), batch)
    assert torch.equal(logits(base, batch), fresh)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, batch), fresh)
    assert not torch.equal(logits(adapted, batch), fresh)
    assert not [name for name, _ in trainable(base)]
    adapted.delete_adapter("two")
    assert torch.equal(logits(adapted, batch), fresh) and adapted.active is None


def test_frozen_tensors_are_shared():
    base, adapted = two()
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    for tree in adapted.trees.values():
        for name, parameter in tree.named_parameters():
            assert (parameter.data_ptr() in shared) == (not parameter.requires_grad), name
    extra = sum(p.numel() for t in adapted.trees.values() for _, p in trainable(t))
    assert sum(p.numel() for p in adapted.parameters()) == sum(p.numel() for p in base.parameters()) + extra


@pytest.mark.parametrize("labels", [True, False])
def test_one_method_per_row(labels):
    _, adapted = two()
    batch = labelled(5)
    names = ["two", "one", "__base__", "one", "two"]
    if not labels:
        del batch["labels"]
    with torch.no_grad():
        mixed = adapted(**batch, adapter_names=names)
    for row, name in enumerate(names):
        tree = adapted.base_model if name == "__base__" else adapted.trees[name]
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        torch.testing.assert_close(mixed.logits[row : row + 1], logits(tree, alone))
    if labels:
        own = torch.nn.functional.cross_entropy(mixed.logits, batch["labels"])
        torch.testing.assert_close(mixed.loss, own)
    else:
        assert "loss" not in mixed


def test_rows_train_their_own_method():
    _, adapted = two()
    batch = labelled(4)
    adapted(**batch, adapter_names=["one", "one", "two", "__base__"]).loss.backward()
    for name in ("one", "two"):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in trainable(adapted.trees[name]))
    assert all(p.grad is None for p in adapted.base_model.parameters())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_rows_are_continued_by_their_own_method(settings):
    adapted = get_model(tiny("llama"), LORA, "one")
    adapted.add_adapter("two", SMALL, seed=1)
    for name in ("one", "two"):
        adapted.set_adapter(name)
        with torch.no_grad():
            for _, tensor in trainable(adapted.model):
                generator = torch.Generator().manual_seed(tensor.numel())
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
    batch, names = padded(4), ["two", "one", "__base__", "two"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    adapted.eval()
    alone = {name: adapted._by_name()[name].generate(**batch, **settings) for name in set(names)}
    assert len({str(ids) for ids in alone.values()}) == 3
    # One method's rows end early: what is behind their end is padding.
    each = settings.get("num_return_sequences", 1)
    ends = int(alone["one"][each, batch["input_ids"].shape[1]])
    for end in (None, ends):
        asked = {**settings, "eos_token_id": end}
        got = adapted.generate(**batch, adapter_names=names, **asked)
        for row, name in enumerate(names):
            want = adapted._by_name()[name].generate(**{k: v[row : row + 1] for k, v in batch.items()}, **asked)
            mine = got[row * each : (row + 1) * each]
            assert torch.equal(mine[:, : want.shape[1]], want) and (mine[:, want.shape[1] :] == 0).all()
    with pytest.raises(UserError, match="leave return_dict_in_generate and streamer out"):
        adapted.generate(**batch, adapter_names=names, return_dict_in_generate=True)


def test_prints_what_peft_prints(capsys):
    from peft import LoraConfig, get_peft_model

    adapted = get_model(tiny(), LORA)
    adapted.print_trainable_parameters()
    ours = capsys.readouterr().out
    with warnings.catch_warnings():
        # PEFT asks transformers for a name that it is giving up.
        warnings.simplefilter("ignore", FutureWarning)
        theirs = get_peft_model(tiny(), LoraConfig(r=4, modules_to_save=["classifier", "pooler"]))
    theirs.print_trainable_parameters()
    found = capsys.readouterr().out
    # PEFT keeps a second copy of what it trains of the base itself, and counts it.
    assert ours.split(" || ")[0] == found.split(" || ")[0]
    assert [part.split(":")[0] for part in ours.split(" || ")] == [part.split(":")[0] for part in found.split(" || ")]
    trained, total = adapted.get_nb_trainable_parameters()
    assert (
        ours == f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
    )


def test_merged_is_plain_and_the_same():
    base, adapted = two()
    batch = labelled(4, seed=5)
    adapted.set_adapter("one")
    want = logits(adapted, batch)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(base)
    assert {type(m) for m in merged.modules()} == {type(m) for m in tiny().modules()}
    torch.testing.assert_close(logits(merged, batch), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(adapted, batch), want)
    adapted.set_adapter("two")
    with pytest.raises(UserError, match="method adapter adds what no weight can hold"):
        adapted.merge_and_unload()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_loss_of_a_mixed_batch_is_the_whole_batchs(family):
    """Of labels that are left out, too, and of a row without any."""
    architecture = "BertForTokenClassification" if family == "bert" else None
    adapted = get_model(tiny(family, architecture=architecture), SMALL, "one")
    adapted.add_adapter("two", SMALL)
    batch = padded()
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    labels[2] = -100
    with torch.no_grad():
        want = adapted(**batch, labels=labels)
        got = adapted(**batch, labels=labels, adapter_names=["one", "two", "two", "one"])
        unseen = adapted(**batch, labels=labels, adapter_names=["one", "one", "two", "one"])
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(unseen.loss, want.loss)


def test_transformers_trainer(tmp_path):
    """Saves what the adapters have of their own, evaluates, and goes on from a checkpoint to the same weights."""
    from transformers import Trainer, TrainingArguments

    batch = labelled(8)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 1e-2}

    def trainer():
        arguments = TrainingArguments(str(tmp_path), max_steps=4, save_steps=2, **settings)
        return Trainer(get_model(tiny(), LORA, "one"), arguments, train_dataset=rows, eval_dataset=rows)

    first = trainer()
    first.train()
    assert first.evaluate()["eval_loss"] > 0
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert stored.keys() == {name for name, p in first.model.named_parameters() if p.requires_grad}
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(first.model.get_parameter(name), again.model.get_parameter(name)) for name in stored)


METHODS_HERE = {
    "houlsby": {"type": "adapter", "placement": "houlsby", "size": 4},
    "pfeiffer": SMALL,
    "parallel": {"type": "adapter", "placement": "parallel", "size": 4},
    "invertible": {"type": "adapter", "size": 4, "invertible": True},
    "ladder": {"type": "side", "network": "ladder", "size": 8},
    "lora": LORA,
    **{name: {"type": name} for name in ("prefix", "mask", "diff", "head_gates", "probe", "scalar_mix")},
    **{f"probe, {head}": {"type": "probe", "head": head} for head in ("mlp", "bilstm")},
}


@pytest.mark.parametrize("name", drawn(3, METHODS_HERE))
def test_on_a_base_in_bf16(name):
    """Trained in it, and what is made of it stays in it."""
    adapted = get_model(tiny().bfloat16(), METHODS_HERE[name])
    batch = labelled(4)
    out = adapted(**batch)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    grads = [p.grad for _, p in trainable(adapted) if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    shipped = adapted.settled()
    assert all(p.dtype == torch.bfloat16 for n, p in shipped.named_parameters() if n in dict(tiny().named_parameters()))
    exact = get_model(tiny(), METHODS_HERE[name]).settled()
    torch.testing.assert_close(logits(shipped, batch).float(), logits(exact, batch), atol=0.15, rtol=0.1)


def test_a_trainer_can_take_it():
    """Calls, attributes, saving of state and training mode reach the active tree."""
    _, adapted = two()
    assert adapted.config.model_type == "bert"
    assert adapted.train().trees["one"].training and not adapted.eval().trees["two"].training
    other = two()[1]
    with torch.no_grad():
        for _, parameter in trainable(other):
            parameter.zero_()
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(other, labelled(4)), logits(adapted, labelled(4)))


def test_generates():
    adapted = get_model(tiny("llama"), SMALL)
    out = adapted.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda a: a.add_adapter("one", SMALL), "'one': the name is taken"),
        (lambda a: a.add_adapter("a.b", SMALL), "letters, digits"),
        (lambda a: a.add_adapter("team/a", SMALL), "letters, digits"),
        (lambda a: a.add_adapter("keys", SMALL), "letters, digits"),
        (lambda a: get_model(a, SMALL), "a Adapted is no base"),
        (lambda a: a.add_adapter("three", {"type": "adaptor"}), "did you mean 'adapter'"),
        (lambda a: a.add_adapter("three", {"type": "adapter", "sise": 3}), "unknown field"),
        (lambda a: a.set_adapter("on"), "did you mean 'one'"),
        (lambda a: a.delete_adapter("x"), "'x' is not there"),
        (lambda a: a(**labelled(4), adapter_names=["one"] * 3), "3 names for a batch of 4 rows"),
        (lambda a: a(**labelled(4), adapter_names=["one", "tow", "one", "one"]), "'tow' is not there"),
        (
            lambda a: a(**padded(4), adapter_names=["one"] * 4, past_key_values=object()),
            "call generate with adapter_names",
        ),
    ],
)
def test_refuses(act, message):
    adapted = get_model(tiny(), SMALL, "one")
    with pytest.raises(UserError, match=message):
        act(adapted)
    assert isinstance(adapted, Adapted) and list(adapted.trees) == ["one"] and set(adapted.methods) == {"one"}


def test_every_method_by_name():
    fields = {"layers": {"top": 1}}
    for name in ("full", "layers", "adapter", "probe", "peft"):
        assert name in METHODS
        adapted = get_model(tiny(), {"type": name, **fields.get(name, {})})
        assert adapted.get_nb_trainable_parameters()[0] > 0


def test_a_refused_method_leaves_the_base_frozen():
    adapted = get_model(tiny(), {"type": "mask", "head": "masked"}, "mask")
    before = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    with pytest.raises(UserError, match="nothing"):
        adapted.add_adapter("b", {"type": "peft", "config": {"peft_type": "LORA", "target_modules": ["nothing"]}})
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == before
    assert not any(parameter.requires_grad for parameter in adapted.base_model.parameters())


@pytest.mark.parametrize("fields", [{"type": "diff", "density": 0.05}, {"type": "head_gates"}])
def test_a_loop_of_ones_own_ends_with_what_ships(fields):
    """With the method's groups, penalty and schedule, `settled` changes no logit."""
    adapted = get_model(tiny(), fields)
    batch, steps = labelled(8), 12
    optimizer = torch.optim.AdamW(adapted.param_groups(), lr=1e-2)
    adapted.train().after_step(0.0)
    for step in range(1, steps + 1):
        outputs = adapted(**batch)
        terms = adapted.loss_terms(batch, outputs)
        (outputs.loss + sum(terms.values())).backward()
        optimizer.step()
        adapted.after_step(step / steps)
        optimizer.zero_grad()
    torch.testing.assert_close(logits(adapted.settled(), batch), logits(adapted.eval(), batch), atol=1e-5, rtol=1e-5)


def test_what_ships_is_not_trained(tmp_path):
    get_model(tiny(), LORA, "one").save_pretrained(tmp_path)
    loaded = Adapted.from_pretrained(tiny(), tmp_path)
    with pytest.raises(UserError, match="load it with is_trainable"):
        loaded.param_groups()


def test_rows_of_one_batch_want_heads_of_one_shape():
    adapted = get_model(tiny(), SMALL, "one")
    adapted.add_adapter("two", SMALL)
    adapted.trees["two"].classifier = torch.nn.Linear(32, 5)
    rows = padded(2)
    with pytest.raises(UserError, match="'one' and 'two' give logits of other shapes"):
        adapted(**rows, adapter_names=["one", "two"])
