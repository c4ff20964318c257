"""Save and load of every method: the same logits on a base loaded again, its frozen tensors shared, damage refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressft.adapters.named_adapters import Adapted
from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.transform import trainable
from tests.adapters.saved import LORA, adapted_on, batch_of, config_of, loaded, moved, rewrite, same
from tests.methods.added import save_adapter
from tests.settings import fields
from tests.tiny import fit, labelled, logits, tiny

SMALL = {"type": "adapter", "size": 4}
# Every method, and the format that holds it.
CASES = {name: (fields(name), "peft" if name == "peft" else "compressft") for name in METHODS}
CASES |= {
    "mlp probe": ({"type": "probe", "head": "mlp"}, "compressft"),
    "pfeiffer, invertible": ({**SMALL, "placement": "pfeiffer", "invertible": True}, "compressft"),
    "parallel": ({**SMALL, "placement": "parallel"}, "compressft"),
    "ladder": ({"type": "side", "network": "ladder"}, "compressft"),
    "prefix, shifted": ({"type": "prefix", "length": 3, "hidden": 8, "shift_positions": True}, "peft"),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two saved adapters on the base of these tests."""
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / str(i), lambda: tiny(), seed=i) for i in (0, 1)]


def made(bases, name, two=()):
    fields = dict(CASES[name][0])
    if fields["type"] == "fusion":
        fields["adapters"] = list(two)
    adapted = adapted_on(bases(), fields)
    fit(adapted.model, [adapted.methods["default"]], [labelled(4)], 2)
    return adapted


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded(bases, two, tmp_path, name):
    adapted = made(bases, name, two)
    want = adapted.settled()
    assert adapted.save_pretrained(tmp_path) == {"default": CASES[name][1]}
    base = loaded(bases())
    again = Adapted.from_pretrained(base, tmp_path)
    assert again.active == "default" and again.methods["default"].type == CASES[name][0]["type"]
    same(again, want)
    with again.disable_adapter():
        same(again, loaded(bases()))
    # A method that changes little keeps the base's tensors.
    shared = {p.data_ptr() for p in base.parameters()}
    assert name in ("full", "task_vector", "head_gates", "lsh_attention") or any(
        p.data_ptr() in shared for p in again.model.parameters()
    )
    assert not list(trainable(again))
    # And saved from what was loaded once more.
    again.save_pretrained(tmp_path / "again")
    same(Adapted.from_pretrained(loaded(bases()), tmp_path / "again"), want)


@pytest.mark.parametrize("preset", ["masking", "supermask"])
@pytest.mark.parametrize("head", ["trained", "masked"])
def test_many_masks_on_one_base(bases, tmp_path, preset, head):
    """What a loaded mask has of its own is a bit a weight and the head; saved again or merged it is what it was."""
    folders = [adapted_on(bases(), {"type": "mask", "preset": preset, "head": head}) for _ in range(2)]
    for seed, adapted in enumerate(folders):
        fit(adapted.model, [adapted.methods["default"]], [labelled(4, seed=seed)], 3, learning_rate=2e-2)
        adapted.save_pretrained(tmp_path / str(seed))
    base = loaded(bases())
    again = Adapted(base)
    for seed in (0, 1):
        again.load_adapter(tmp_path / str(seed), str(seed))
    shared = {tensor.data_ptr() for tensor in (*base.parameters(), *base.buffers())}
    for seed, adapted in enumerate(folders):
        again.set_adapter(str(seed))
        want = adapted.settled()
        same(again, want)
        masked = [path for path, module in adapted.model.named_modules() if getattr(module, "gates", None)]
        own = {n: t for n, t in again.model.state_dict().items() if t.data_ptr() not in shared}
        extra = [n for n in own if not n.endswith((".bits", ".updates"))]
        assert masked and sum(n.endswith(".bits") for n in own) == len(masked)
        assert all("classifier" in n or "pooler" in n for n in extra)
        same(again.merge_and_unload(), want)
    again.save_pretrained(tmp_path / "again")
    for seed in (0, 1):
        files = [load_file(f / str(seed) / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "again")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    with pytest.raises(UserError, match="was loaded as it ships"):
        again.param_groups()


@pytest.mark.parametrize("family", ["roberta", "distilbert", "llama", "gpt2"])
@pytest.mark.parametrize("name", ["adapter", "prefix", "mask", "parallel"])
def test_families(bases, tmp_path, family, name):
    classes = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
    folder = bases(family, classes.get(family))
    adapted = adapted_on(folder, CASES[name][0], family)
    adapted.save_pretrained(tmp_path)
    same(Adapted.from_pretrained(loaded(folder), tmp_path), adapted.settled(), family)


def test_language_model_with_tied_embeddings(bases, tmp_path):
    folder = bases("gpt2")
    for number, method in enumerate((SMALL, {"type": "full"})):
        adapted = adapted_on(folder, method, "gpt2", architecture="AutoModelForCausalLM")
        target = tmp_path / str(number)
        adapted.save_pretrained(target)
        again = Adapted.from_pretrained(loaded(folder, "AutoModelForCausalLM"), target)
        same(again, adapted.settled(), "gpt2")
        assert again.model.lm_head.weight is again.model.transformer.wte.weight


def test_without_a_head(bases, tmp_path):
    """A backbone alone: an encoder of sentences."""
    for number, (method, kept) in enumerate(((SMALL, "compressft"), (LORA, "peft"))):
        adapted = adapted_on(bases(), method, architecture="AutoModel")
        assert adapted.save_pretrained(tmp_path / str(number)) == {"default": kept}
        again = Adapted.from_pretrained(loaded(bases(), "AutoModel"), tmp_path / str(number))
        with torch.no_grad():
            want, got = (model(**batch_of("bert")).last_hidden_state for model in (adapted, again))
        assert torch.equal(got, want) or (kept == "peft" and torch.allclose(got, want, atol=1e-5))


def test_another_head_on_the_base_does_not_matter(bases, tmp_path):
    """The head that was trained comes with the adapter, whatever the base's was, even if no step was done."""
    from compressft import get_model

    adapted = get_model(loaded(bases()), SMALL)
    adapted.save_pretrained(tmp_path)
    other = loaded(bases())
    with torch.no_grad():
        other.classifier.weight.add_(1.0)
        other.bert.pooler.dense.weight.add_(1.0)
    same(Adapted.from_pretrained(other, tmp_path), adapted.settled())


def test_named_adapters(bases, tmp_path):
    adapted = adapted_on(bases(), SMALL, name="one")
    adapted.add_adapter("two", {"type": "scalar_mix"})
    adapted.add_adapter("lora", LORA)
    moved(adapted)
    assert adapted.save_pretrained(tmp_path) == {"one": "compressft", "two": "compressft", "lora": "peft"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "one", "two"]
    again = Adapted.from_pretrained(loaded(bases()), tmp_path)
    assert list(again.trees) == ["lora", "one", "two"] and again.active == "lora"
    batch, names = batch_of("bert"), ["two", "lora", "__base__", "one"]
    with torch.no_grad():
        want, got = (model(**batch, adapter_names=names).logits for model in (adapted.eval(), again))
    assert torch.equal(got, want)
    one = Adapted.from_pretrained(loaded(bases()), tmp_path / "two", "mix")
    assert list(one.trees) == ["mix"]
    adapted.save_pretrained(tmp_path / "few", selected_adapters=["two"])
    assert [path.name for path in (tmp_path / "few").iterdir()] == ["two"]


def test_trained_on(bases, two, tmp_path):
    for name in ("adapter", "peft", "scalar_mix", "fusion"):
        adapted = made(bases, name, two)
        folder = tmp_path / name
        adapted.save_pretrained(folder)
        again = Adapted.from_pretrained(loaded(bases()), folder, "default", is_trainable=True).eval()
        same(again, adapted.settled())
        assert {n for n, _ in trainable(again.model)} == {n for n, _ in trainable(adapted.model)}
        before = logits(again, batch_of("bert"))
        fit(again.model, [again.methods["default"]], [labelled(4)], 1, learning_rate=1e-2)
        assert not torch.equal(logits(again, batch_of("bert")), before)
        same(again.base_model, loaded(bases()))
    adapted = made(bases, "mask")
    adapted.save_pretrained(tmp_path / "mask")
    model = Adapted(loaded(bases()))
    with pytest.raises(UserError, match="method mask ships as something else than it trains"):
        model.load_adapter(tmp_path / "mask", "default", is_trainable=True)
    assert not model.trees and model.active is None
    model.add_adapter("mine", SMALL)
    with pytest.raises(UserError, match="method mask ships"):
        model.load_adapter(tmp_path / "mask", "default", is_trainable=True)
    assert list(model.trees) == ["mine"] and model.active == "mine"


def test_what_is_stored_is_small(bases, tmp_path):
    """A mask is bits, an adapter its own tensors and the head."""
    mask = adapted_on(bases(), {"type": "mask"})
    mask.save_pretrained(tmp_path / "mask")
    stored = load_file(tmp_path / "mask" / "adapter_model.safetensors")
    assert "bert.encoder.layer.1.output.dense.weight#dropped_bits" in stored
    entry = config_of(tmp_path / "mask")["compressft"]
    assert entry["method"]["type"] == "mask" and entry["base"] == str(bases()) and entry["origin_hash"]
    small = adapted_on(bases(), {**SMALL, "placement": "pfeiffer"})
    small.save_pretrained(tmp_path / "small")
    stored = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert set(stored) == {name for name, _ in trainable(small.model)}
    assert config_of(tmp_path / "small")["compressft"]["origin_hash"] is None


def test_fusion_reads_saved_adapters(bases, tmp_path):
    """What save_pretrained wrote is what a stack or a fusion may be made of."""
    for number in (0, 1):
        adapted_on(bases(), {**SMALL, "placement": "pfeiffer"}).save_pretrained(tmp_path / str(number))
    fused = adapted_on(bases(), {"type": "fusion", "adapters": [str(tmp_path / "0"), str(tmp_path / "1")]})
    assert fused.get_nb_trainable_parameters()[0] > 0
    adapted_on(bases(), LORA).save_pretrained(tmp_path / "lora")
    with pytest.raises(UserError, match="another package's adapter; make it ours with: compressft convert"):
        adapted_on(bases(), {"type": "fusion", "adapters": [str(tmp_path / "lora")]})


@pytest.fixture
def saved(bases, tmp_path):
    adapted_on(bases(), {**SMALL, "placement": "pfeiffer"}).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def refused(bases, folder, match, base=None):
    with pytest.raises(UserError, match=match) as caught:
        Adapted.from_pretrained(base or loaded(bases()), folder)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(bases, saved):
    refused(bases, saved, "made on another base than the model here", loaded(bases(seed=3)))
    refused(bases, saved, "loaded as BertForSequenceClassification", loaded(bases(), "AutoModel"))
    other = loaded(bases())
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    refused(bases, saved, "another base", other)
    # Embeddings are none of an adapter's business, but they are of what is stored as a difference to them.
    other = loaded(bases())
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] += 1
    Adapted.from_pretrained(other, saved)


def test_a_difference_wants_its_own_base(bases, tmp_path):
    adapted = adapted_on(bases(), {"type": "mask"})
    with torch.no_grad():
        adapted.model.bert.embeddings.word_embeddings.weight = torch.nn.Parameter(
            adapted.model.bert.embeddings.word_embeddings.weight.masked_fill(torch.arange(97)[:, None] == 5, 0.0)
        )
    adapted.save_pretrained(tmp_path)
    assert any(
        "word_embeddings" in name and "#dropped" in name for name in load_file(tmp_path / "adapter_model.safetensors")
    )
    other = loaded(bases())
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight[0, 0] += 1
    refused(bases, tmp_path, "another base", other)


def test_damaged_folders_are_refused(bases, saved, tmp_path):
    file, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    entry, raw = config_of(saved)["compressft"], file.read_bytes()

    def written(**changes):
        config.write_text(json.dumps({"compressft": {**entry, **changes}}))

    written(colour="red")
    refused(bases, saved, r"unknown field compressft\.colour")
    written(format=2)
    refused(bases, saved, "format 2; this compressft reads 1")
    config.write_text(json.dumps({"compressft": {k: v for k, v in entry.items() if k != "modules"}}))
    refused(bases, saved, r"field compressft\.modules is missing")
    written(method={"type": "adapter", "sise": 3})
    refused(bases, saved, "unknown field")
    written(method={"type": "adaptor"})
    refused(bases, saved, "did you mean 'adapter'")
    config.write_text("{")
    refused(bases, saved, "is not JSON")
    config.write_text("{}")
    refused(bases, saved, "has neither 'compressft' ")
    written()
    file.write_bytes(raw[:-1])
    refused(bases, saved, "its hash is not the recorded one")
    file.unlink()
    refused(bases, saved, "is missing")
    refused(bases, tmp_path / "nowhere", "is no folder")
    config.unlink()
    refused(bases, saved, "adapter_config.json: is missing")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"files": []}, r"field 'compressft\.files' wants an object"),
        ({"files": {}}, r"compressft\.files does not name adapter_model\.safetensors"),
        ({"shapes": 1}, r"field 'compressft\.shapes' wants a list of layers"),
        ({"shapes": [{"heads": 4, "kv_heads": 4, "ffn": 65}] * 2}, r"shapes\.0\.ffn is 65, the model has 64"),
        ({"modules": []}, r"field 'compressft\.modules' wants an object"),
        ({"modules": {"classifier": {"kind": "newer"}}}, "classifier: unknown kind 'newer'; .* newer compressft"),
        ({"labels": {"a": "b"}}, r"field 'compressft\.labels' wants"),
        ({"base": 3}, r"field 'compressft\.base' wants a string, holds 3"),
    ],
)
def test_wrong_fields_are_refused(bases, saved, changes, match):
    config = saved / "adapter_config.json"
    rewrite(config, compressft={**config_of(saved)["compressft"], **changes})
    refused(bases, saved, match)
    if "files" in changes:
        with pytest.raises(UserError, match=match):
            adapted_on(bases(), {"type": "fusion", "adapters": [str(saved)] * 2})


def test_wrong_tensors_are_refused(bases, saved):
    from compressft.utils.files import file_hash

    file, config = saved / "adapter_model.safetensors", saved / "adapter_config.json"
    tensors, entry = load_file(file), config_of(saved)["compressft"]
    key = "bert.encoder.layer.0.output.LayerNorm.adapter.up_bias"

    def written(new):
        save_file(new, file)
        rewrite(config, compressft={**entry, "files": {file.name: file_hash(file)}})

    written({**tensors, key: torch.zeros(7)})
    refused(bases, saved, rf"'{key}' has shape \(7,\), the model's has \(32,\)")
    written({name: tensor for name, tensor in tensors.items() if name != key})
    refused(bases, saved, f"'{key}' is missing")
    written({**tensors, "bert.nothing": torch.zeros(1)})
    refused(bases, saved, "'bert.nothing' has no place")
    written({**tensors, "classifier.weight": torch.zeros(5, 32)})
    refused(bases, saved, r"'classifier.weight' has shape \(5, 32\)")


def test_names(bases, tmp_path):
    model = Adapted(loaded(bases()))
    with pytest.raises(UserError, match="there is no adapter"):
        model.save_pretrained(tmp_path)
    adapted = adapted_on(bases(), SMALL)
    with pytest.raises(UserError, match="'x' is not there"):
        adapted.save_pretrained(tmp_path, selected_adapters=["x"])
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the name is taken"):
        adapted.load_adapter(tmp_path, "default")


def test_a_runs_delta(bases, tmp_path):
    """The adapters of a run, with what its recipe says of them."""
    folder = tmp_path / "run" / "delta"
    save_adapter(folder, lambda: tiny())
    with pytest.raises(UserError, match="does not say which method"):
        Adapted(loaded(bases())).load_adapter(folder, "x")
