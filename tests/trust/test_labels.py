"""Labels, tokenizers and checkpoints of others: matched by name, refused in one line, or made to work."""

import json

import pytest
import torch
import transformers

from compressft.errors import UserError
from compressft.model.labels import head_layers, in_order_of, names_of, refuse_alike, renew_head, reorder
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.source import load_tokenizer
from compressft.run.program import check_vocabulary
from compressft.run.stage import refuse_reader
from tests.tiny import TINY, batch_for, logits, tiny
from tests.tiny_folder import document, rows_of, save_tiny, write_jsonl

NAMES = {"id2label": {0: "odd", 1: "even", 2: "prime"}, "label2id": {"odd": 0, "even": 1, "prime": 2}}
SORTED = ("even", "odd", "prime")


def classifier(family):
    name = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family)
    architecture = {"architecture": f"{name}ForSequenceClassification"} if name else {}
    return tiny(family, num_labels=3, **architecture, **NAMES)


@pytest.mark.parametrize("family", TINY)
def test_a_teachers_outputs_take_the_tasks_order(family):
    model = classifier(family)
    before = logits(model, batch_for(family))
    reorder(model, SORTED, "teacher 'x'")
    torch.testing.assert_close(logits(model, batch_for(family)), before[:, [1, 0, 2]], rtol=0, atol=0)
    assert names_of(model.config) == SORTED
    reorder(model, SORTED, "teacher 'x'")
    torch.testing.assert_close(logits(model, batch_for(family)), before[:, [1, 0, 2]], rtol=0, atol=0)


def test_other_labels_are_refused_and_unknown_ones_stay_where_they_are():
    model = tiny(num_labels=3, **NAMES)
    with pytest.raises(UserError, match=r"teacher 'x' was trained for other labels .*'square' is on one side alone"):
        reorder(model, ("even", "odd", "square"), "teacher 'x'")
    plain = tiny(num_labels=3)
    before = logits(plain, batch_for("bert"))
    reorder(plain, SORTED, "teacher 'x'")
    assert torch.equal(logits(plain, batch_for("bert")), before)


def test_a_checkpoint_keeps_its_own_order():
    config = tiny(num_labels=3, **NAMES).config
    assert in_order_of(SORTED, config) == ("odd", "even", "prime")
    assert in_order_of(("a", "b", "c"), config) == ("a", "b", "c")
    assert in_order_of(SORTED, tiny(num_labels=3).config) == SORTED


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "llama", "gpt2"])
def test_a_head_for_other_labels_is_drawn_anew(family, tmp_path):
    saved = classifier(family)
    saved.save_pretrained(tmp_path)
    kind = "AutoModelForSequenceClassification"
    own = load_model(str(tmp_path), kind, new_head=True, num_labels=3, **NAMES)
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), saved.state_dict().values(), strict=True))
    for names in (["a", "b", "c"], ["a", "b"]):
        wanted = {"num_labels": len(names), "id2label": dict(enumerate(names))}
        model = load_model(str(tmp_path), kind, new_head=True, **wanted)
        heads = {id(p) for layer in head_layers(model) for p in layer.parameters()}
        old = saved.state_dict()
        for name, parameter in model.named_parameters():
            same = old[name].shape == parameter.shape and torch.equal(old[name], parameter)
            # A bias is drawn as 0 both times.
            assert same != (id(parameter) in heads) or name.endswith("bias"), name
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(str(tmp_path), kind, num_labels=2)


def test_a_compressed_folder_goes_on_with_other_labels(tmp_path):
    """Its head answers for the old ones; the next folder names the new ones, in both of its files."""
    saved = classifier("bert").eval()
    save_compressed(saved, None, tmp_path / "one", {"labels": list(NAMES["id2label"].values())})
    kind, names = "AutoModelForSequenceClassification", {0: "a", 1: "b", 2: "c"}
    own = load_model(str(tmp_path / "one"), kind, new_head=True, num_labels=3, **NAMES)
    assert torch.equal(own.classifier.weight, saved.classifier.weight)
    model = load_model(str(tmp_path / "one"), kind, new_head=True, num_labels=3, id2label=names)
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)
    save_compressed(model, None, tmp_path / "two", {"labels": list(names.values())})
    assert names_of(load_compressed(tmp_path / "two").config) == ("a", "b", "c")


def test_renewed_heads_differ():
    model = tiny(num_labels=3)
    torch.manual_seed(5)
    before = model.classifier.weight.clone()
    renew_head(model)
    assert not torch.equal(model.classifier.weight, before)


def test_no_tokenizer_is_made_up(tmp_path):
    save_tiny(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match="has no tokenizer files"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_sentencepiece_file_names_its_package(tmp_path, monkeypatch):
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"x")
    monkeypatch.setattr("compressft.model.source.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path))


def test_a_padding_token_is_found_or_asked_for(tmp_path):
    tokenizer = load_tokenizer("minilm")
    for kept, pads in ((("unk_token",), "[UNK]"), ((), None)):
        for name in ("pad_token", "eos_token", "unk_token", "bos_token", "sep_token", "cls_token", "mask_token"):
            if name not in kept:
                setattr(tokenizer, name, None)
        tokenizer.save_pretrained(tmp_path)
        if pads is None:
            with pytest.raises(UserError, match="give it a padding token"):
                load_tokenizer(str(tmp_path))
        else:
            assert load_tokenizer(str(tmp_path)).pad_token == pads


def test_a_tokenizer_that_knows_more_is_refused():
    tokenizer = load_tokenizer("minilm")
    with pytest.raises(UserError, match=f"knows {len(tokenizer)} pieces, the model 97"):
        check_vocabulary("x", tiny(), tokenizer)
    check_vocabulary("x", tiny(vocab_size=len(tokenizer)), tokenizer)


def test_a_teacher_reads_with_the_same_tokenizer(tmp_path):
    save_tiny(tmp_path / "same")
    save_tiny(tmp_path / "other")
    tokenizer = load_tokenizer("minilm")
    teacher = load_model(str(tmp_path / "same"))
    refuse_reader(teacher, str(tmp_path / "same"), tokenizer, "teacher 'x'")
    path = tmp_path / "other" / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["apple"], vocabulary["river"] = vocabulary["river"], vocabulary["apple"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="has another tokenizer"):
        refuse_reader(teacher, str(tmp_path / "other"), tokenizer, "teacher 'x'")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_code_of_a_model_is_never_run_or_asked_about(call, tmp_path, monkeypatch, command):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = tmp_path / "model"
    save_tiny(folder)
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "m.C"}}
    config = json.loads((folder / "config.json").read_text()) | own
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "m.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    write_jsonl(tmp_path / "rows.jsonl", rows_of())
    (tmp_path / "r.yaml").write_text(json.dumps(document(folder, tmp_path / "rows.jsonl")))
    done = call(command, "r.yaml")
    assert done.code == 2 and len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert not (tmp_path / "ran").exists()


BROKEN = {
    "empty weights": ("model.safetensors", b""),
    "half a file": ("model.safetensors", b'\x40\x00\x00\x00\x00\x00\x00\x00{"a"'),
    "a list": ("config.json", b"[]"),
    "no JSON": ("config.json", b"{"),
    "text for a size": ("config.json", {"hidden_size": "many"}),
    "a negative size": ("config.json", {"hidden_size": -32}),
    "another size": ("config.json", {"hidden_size": 48}),
    "heads that do not divide": ("config.json", {"num_attention_heads": 5}),
    "an unknown family": ("config.json", {"model_type": "unheard-of"}),
    "a broken tokenizer": ("tokenizer.json", b"{}"),
    "more layers than can be built": ("config.json", {"num_hidden_layers": 10**7}),
    "no layers": ("config.json", {"num_hidden_layers": 0}),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_broken_model_folder_is_one_line(call, tmp_path, case, command):
    folder = save_tiny(tmp_path / "model")
    name, content = BROKEN[case]
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content).encode()
    (folder / name).write_bytes(content)
    write_jsonl(tmp_path / "rows.jsonl", rows_of())
    changes = {"stages": [{"name": "only", "train": {"max_steps": 1, "batch_size": 4}}], "export": {"enabled": False}}
    (tmp_path / "r.yaml").write_text(json.dumps(document(folder, tmp_path / "rows.jsonl", **changes)))
    done = call(command, "r.yaml")
    if command == "plan" and case in ("empty weights", "half a file", "another size"):
        assert done.code == 0, "nothing of the weights is read"
    else:
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert done.code == 2 and len(lines) == 1, done.err


def test_pickled_weights_run_nothing(call, tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_decoders_without_padding_classify(tmp_path):
    """The position that is read is found by the padding token, which the tokenizer lends."""
    tokenizer = load_tokenizer("minilm")
    for family in ("gpt2", "llama", "qwen3"):
        config = transformers.AutoConfig.for_model(
            family, **{**TINY[family][1], "vocab_size": len(tokenizer), "pad_token_id": None}
        )
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / family)
        model = load_model(
            str(tmp_path / family),
            "AutoModelForSequenceClassification",
            new_head=True,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=2,
        )
        rows = tokenizer(["apple", "river stone cloud"], padding=True, return_tensors="pt")
        alone = tokenizer(["apple"], return_tensors="pt")
        with torch.no_grad():
            both = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
            one = model(input_ids=alone["input_ids"], attention_mask=alone["attention_mask"]).logits
        torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("labels", "double"),
    [(("1", "1.0"), "'1' and '1.0'"), (("0", "2.", "2"), r"'2\.' and '2'"), (("yes", "yes "), "'yes' and 'yes '"),
     (("-3", "-3.00"), r"'-3' and '-3\.00'"), (("B-x y", "B-x\xa0y"), "'B-x y' and")],
)  # fmt: skip
def test_one_label_in_two_writings(labels, double):
    with pytest.raises(UserError, match=f"data: labels {double}.* are one label written in two ways"):
        refuse_alike(labels)


@pytest.mark.parametrize("labels", [("1", "01"), ("1.0", "2.5"), ("yes", "Yes"), ("1", "1e0"), ("", "0"), SORTED])
def test_labels_that_are_two(labels):
    refuse_alike(labels)


def test_a_file_with_fractions_is_refused_before_training(tmp_path, call):
    rows = [{"text": f"{row['text']} {i}", "label": "1.0" if i % 3 else "1"} for i, row in enumerate(rows_of())]
    write_csv = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    (tmp_path / "rows.csv").write_text(write_csv)
    recipe = document(save_tiny(tmp_path / "base"), "rows.csv")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for command in (("plan", "recipe.yaml"), ("run", "recipe.yaml", "--output", "out")):
        done = call(*command)
        assert (done.code, done.out) == (2, "")
        assert done.err.strip() == (
            "error: data: labels '1' and '1.0' are one label written in two ways; write them alike"
        )
    assert not (tmp_path / "out").exists()
