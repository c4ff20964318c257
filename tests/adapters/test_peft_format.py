"""PEFT's folders: what we save, PEFT loads to the same logits; what PEFT saves, we load."""

import json
import warnings

import pytest
import torch
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from compressft.adapters.named_adapters import Adapted
from compressft.errors import UserError
from tests.adapters.saved import LORA, adapted_on, config_of, loaded, rewrite, same
from tests.methods.added import shaken
from tests.tiny import TINY, logits

pytestmark = pytest.mark.dear

SEQUENCE = "AutoModelForSequenceClassification"
CLASSES = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
CLASSES |= {"qwen2": "Qwen2ForSequenceClassification"}
TUNERS = {
    "lora": LORA["config"],
    "rank pattern": {"peft_type": "LORA", "target_modules": ["value"], "rank_pattern": {"0.attention.self.value": 2}},
    "all linears": {"peft_type": "LORA", "r": 3, "target_modules": "all-linear", "use_rslora": True},
    "dora": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "pooler too": {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value", "dense"]},
    "lora bias": {"peft_type": "LORA", "r": 4, "lora_bias": True},
    "ia3": {"peft_type": "IA3"},
    "ia3 of attention alone": {"peft_type": "IA3", "target_modules": ["key", "value"], "feedforward_modules": []},
    "loha": {"peft_type": "LOHA", "r": 2},
    "lokr": {"peft_type": "LOKR", "r": 2},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "r": 0},
    "hra": {"peft_type": "HRA", "r": 4},
}
PREFIX = {"type": "prefix", "length": 3, "reparameterise": False}


def theirs(folder, path, architecture=SEQUENCE):
    """The folder loaded by PEFT, on a base of its own; its warnings are errors."""
    with warnings.catch_warnings():
        # That a Conv1D has its weight the other way round, and a name that transformers is giving up.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(loaded(folder, architecture), str(path)).eval()


def architecture_of(family):
    return CLASSES.get(family, TINY[family][0])


CASES = [("bert", name) for name in TUNERS] + [(f, n) for f in ("llama", "gpt2") for n in ("lora", "dora", "ia3")]
CASES += [("roberta", "lora"), ("distilbert", "lora"), ("llama", "all linears"), ("electra", "lora")]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_peft_loads_our_tuners(bases, tmp_path, family, name):
    folder = bases(family, architecture_of(family))
    adapted = adapted_on(folder, {"type": "peft", "config": dict(TUNERS[name])}, family)
    assert adapted.save_pretrained(tmp_path) == {"default": "peft"}
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and "peft.PeftModel.from_pretrained" in card.text
    same(theirs(folder, tmp_path), adapted, family, 1e-5)
    # And we what they loaded.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(folder, tmp_path).save_pretrained(tmp_path / "theirs")
    same(Adapted.from_pretrained(loaded(folder), tmp_path / "theirs"), adapted, family, 1e-5)
    ours, other = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "theirs"))
    assert ours.keys() == other.keys() and all(torch.equal(ours[key], other[key]) for key in ours)
    mine, found = config_of(tmp_path), config_of(tmp_path / "theirs")
    assert mine.keys() == found.keys()
    for key in mine:
        if key not in ("modules_to_save", "target_modules"):
            assert mine[key] == found[key], key


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_prefix_both_ways(bases, tmp_path, family):
    """Positions behind the prefix, rotary ones among them: a key is turned, so that it meets a query as it did."""
    architecture = architecture_of(family)
    auto = "AutoModelForCausalLM" if "CausalLM" in architecture or "LMHead" in architecture else SEQUENCE
    folder = bases(family, architecture)
    fields = (
        dict(PREFIX)
        if family in ("gpt2", "llama", "mistral", "qwen2", "qwen3")
        else {**PREFIX, "shift_positions": True}
    )
    adapted = adapted_on(folder, fields, family, architecture=auto)
    assert adapted.save_pretrained(tmp_path) == {"default": "peft"}
    same(theirs(folder, tmp_path, auto), adapted, family, 1e-5)
    same(Adapted.from_pretrained(loaded(folder, auto), tmp_path), adapted, family, 1e-5)
    # PEFT writes the same fields and tensors for it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs(folder, tmp_path, auto).save_pretrained(tmp_path / "theirs")
    ours, other = (load_file(p / "adapter_model.safetensors") for p in (tmp_path, tmp_path / "theirs"))
    assert ours.keys() == other.keys() and ours["prompt_embeddings"].shape == other["prompt_embeddings"].shape
    mine, found = config_of(tmp_path), config_of(tmp_path / "theirs")
    del found["peft_version"], found["modules_to_save"]
    for key, value in found.items():
        assert mine[key] == value, key


def test_without_the_turn_rotary_logits_are_others(bases, tmp_path, monkeypatch):
    from compressft.adapters import peft_prefix

    folder = bases("llama")
    adapted = adapted_on(folder, PREFIX, "llama", architecture="AutoModelForCausalLM")
    monkeypatch.setattr(peft_prefix, "turned", lambda model, key, places: key)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(AssertionError):
        same(theirs(folder, tmp_path, "AutoModelForCausalLM"), adapted, "llama", 1e-2)


def test_a_prefix_with_projection(bases, tmp_path):
    """PEFT's reparameterised prefix is saved as what it gives."""
    folder = bases("gpt2")
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded(folder, "AutoModelForCausalLM"), config).eval()
        model.save_pretrained(tmp_path)
    ours = Adapted.from_pretrained(loaded(folder, "AutoModelForCausalLM"), tmp_path)
    same(ours, model, "gpt2", 1e-5)
    assert ours.methods["default"].length == 4


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["pooler"])),
        ("bert", LoraConfig(r=4, target_modules=["query", "output.dense"], modules_to_save=["LayerNorm"])),
        ("distilbert", IA3Config(task_type="SEQ_CLS", target_modules=["q_lin", "lin2"], feedforward_modules=["lin2"])),
        ("gpt2", LoraConfig(task_type="SEQ_CLS", r=4, use_rslora=True)),
        ("llama", LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", lora_dropout=0.1)),
    ],
)
def test_what_peft_made(bases, tmp_path, family, config):
    """Folders that were trained with PEFT, modules of the base among what it saved."""
    folder = bases(family, architecture_of(family))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded(folder), config).eval()
        shaken(model, "lora", "ia3", "modules_to_save")
        model.save_pretrained(tmp_path)
    ours = Adapted.from_pretrained(loaded(folder), tmp_path)
    same(ours, model, family, 1e-5)
    with pytest.raises(AssertionError):
        same(ours, loaded(folder), family, 1e-3)
    ours.save_pretrained(tmp_path / "again")
    same(theirs(folder, tmp_path / "again"), model, family, 1e-5)


def test_pickled_tensors(bases, tmp_path):
    folder = bases()
    adapted_on(folder, LORA).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    want = Adapted.from_pretrained(loaded(folder), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    same(Adapted.from_pretrained(loaded(folder), tmp_path), want)
    torch.save(print, tmp_path / "adapter_model.bin")
    refused(folder, tmp_path, "cannot be read as tensors")


def refused(folder, path, match):
    with pytest.raises(UserError, match=match) as caught:
        Adapted.from_pretrained(loaded(folder), path)
    assert "\n" not in str(caught.value)


def test_refused(bases, tmp_path):
    folder = bases()
    adapted_on(folder, LORA).save_pretrained(tmp_path)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, raw = load_file(file), file.read_bytes()
    values = json.loads(config.read_text())
    refused(bases(seed=3), tmp_path, "another base than the model here")
    key = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    refused(folder, tmp_path, f"'{key}': missing")
    save_file({**tensors, "base_model.model.nothing": torch.zeros(2)}, file)
    refused(folder, tmp_path, "'base_model.model.nothing': has no place")
    save_file({**tensors, key: torch.zeros(3, 32)}, file)
    refused(folder, tmp_path, "size mismatch")
    file.write_bytes(raw)
    rewrite(config, colour="red")
    refused(folder, tmp_path, "colour")
    for changed, match in (
        ({"peft_type": "LORRA"}, "'LORRA' is not known"),
        ({"bias": "all"}, "bias 'all' also trains"),
        ({"target_modules": ["word_embeddings"]}, "has no place"),
    ):
        config.write_text(json.dumps({**values, **changed}))
        refused(folder, tmp_path, match)


def test_what_puts_tokens_in_front_is_refused(bases, tmp_path):
    folder = bases("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            loaded(folder, "AutoModelForCausalLM"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        )
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="peft_type PROMPT_TUNING is not read; PREFIX_TUNING is"):
        Adapted.from_pretrained(loaded(folder, "AutoModelForCausalLM"), tmp_path)


def test_prefix_refused(bases, tmp_path):
    folder = bases("gpt2")
    adapted_on(folder, PREFIX, "gpt2", architecture="AutoModelForCausalLM").save_pretrained(tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    raw, values = file.read_bytes(), json.loads(config.read_text())

    def refuse(match):
        with pytest.raises(UserError, match=match):
            Adapted.from_pretrained(loaded(folder, "AutoModelForCausalLM"), tmp_path)

    rewrite(config, num_transformer_submodules=2)
    refuse("num_transformer_submodules")
    config.write_text(json.dumps({**values, "colour": "red"}))
    refuse("unknown field colour")
    config.write_text(json.dumps({**values, "num_virtual_tokens": 5}))
    refuse(r"has shape \(3, 128\), the model wants \(5, 128\)")
    config.write_text(json.dumps(values))
    save_file({"other": torch.zeros(1)}, file)
    refuse("'prompt_embeddings' is missing")
    file.write_bytes(raw)
    Adapted.from_pretrained(loaded(folder, "AutoModelForCausalLM"), tmp_path)


def test_kept_in_our_own_format(bases, tmp_path):
    """What PEFT would compute otherwise, or has no place for."""
    for number, (family, method, architecture) in enumerate(
        (
            ("bert", PREFIX, SEQUENCE),
            ("gpt2", {**PREFIX, "shift_positions": False}, "AutoModelForCausalLM"),
            ("distilbert", PREFIX, SEQUENCE),
        )
    ):
        folder = bases(family)
        adapted = adapted_on(folder, method, family, architecture=architecture)
        assert adapted.save_pretrained(tmp_path / str(number)) == {"default": "compressft"}, family
        same(Adapted.from_pretrained(loaded(folder, architecture), tmp_path / str(number)), adapted, family)
    # A projection that is not the base's any more.
    adapted = adapted_on(bases(), LORA)
    query = adapted.model.bert.encoder.layer[0].attention.self.query
    query.weight = torch.nn.Parameter(query.weight * 0.5)
    assert adapted.save_pretrained(tmp_path / "x") == {"default": "compressft"}
    same(Adapted.from_pretrained(loaded(bases()), tmp_path / "x"), adapted)
    assert logits(adapted, {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}).shape == (1, 3)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"peft_type": "LOHA", "r": 2}),
        ("llama", {"peft_type": "LORA", "r": 2, "bias": "lora_only"}),
    ],
)
def test_what_peft_could_not_read_is_kept_in_our_own_format(bases, tmp_path, family, config):
    """PEFT puts few of its types on a Conv1D; biases that are trained too are not read from its folders."""
    folder = bases(family, architecture_of(family))
    adapted = adapted_on(folder, {"type": "peft", "config": config}, family)
    assert adapted.save_pretrained(tmp_path) == {"default": "compressft"}
    same(Adapted.from_pretrained(loaded(folder), tmp_path), adapted, family)
