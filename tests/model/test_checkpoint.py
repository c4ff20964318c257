"""Model and delta folders: bit-exact round trips, plain transformers where the shape allows it, damage refused."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.model.count import count
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.saved.state import plain_state
from compressft.model.shrink import shapes, shrink
from compressft.model.source import content_hash
from compressft.passes.int8 import Int8
from compressft.transform import Context
from compressft.utils.files import write_atomically
from tests.tiny import batch_for, logits, random_keep, tiny


def randomise(model: nn.Module) -> None:
    """Other values everywhere, so that nothing equals its initial value by chance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def compress(family: str, *, int8: str | None = None, adapter: str | None = None, prune: bool = True, **changes):
    """A tiny model that has been through pruning, adapters and int8 ranges."""
    model = tiny(family, **changes)
    context = Context()
    if prune:
        shrink(model, random_keep(model))
    if adapter:
        Adapter(placement=adapter, size=5).prepare(model, context)
    if int8:
        transform = Int8(ranges=int8)
        transform.prepare(model, context)
        with torch.no_grad():
            model.train()(**batch_for(family))
        transform.finalize(model)
    randomise(model)
    return model.eval()


CASES = {
    "bert, pruned per layer": ("bert", {}),
    "bert, pruned and int8": ("bert", {"int8": "static"}),
    "bert, int8 with dynamic ranges": ("bert", {"int8": "dynamic", "prune": False}),
    "bert, pruned, houlsby, int8": ("bert", {"int8": "static", "adapter": "houlsby"}),
    "bert, pruned, pfeiffer, int8": ("bert", {"int8": "static", "adapter": "pfeiffer"}),
    "distilbert, pruned, houlsby": ("distilbert", {"adapter": "houlsby"}),
    "gpt2, pruned (Conv1D), tied": ("gpt2", {}),
    "gpt2, pruned, int8, adapters": ("gpt2", {"int8": "static", "adapter": "pfeiffer"}),
    "llama, pruned, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, pruned, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, pruned, tied, int8, adapters": (
        "llama",
        {"tie_word_embeddings": True, "int8": "static", "adapter": "houlsby"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_exact(case, tmp_path):
    family, options = CASES[case]
    model = compress(family, **options)
    save_compressed(model, None, tmp_path / "model", {"task": "t"})
    loaded = load_compressed(tmp_path / "model")
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    kinds = [{name: type(module) for name, module in m.named_modules()} for m in (model, loaded)]
    assert kinds[0] == kinds[1]
    assert not loaded.training and shapes(loaded) == shapes(model)
    assert count(loaded)["total"] == count(model)["total"]
    assert torch.equal(logits(model, batch_for(family)), logits(loaded, batch_for(family)))
    # A tied weight is stored once and tied again.
    stored = load_file(tmp_path / "model" / "model.safetensors")
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    if tied:
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    if family == "llama":
        assert ("lm_head.weight" in stored) != tied


def test_saved_twice_is_the_same_file(tmp_path):
    """Loading loses nothing, also not the order or layout of tensors."""
    save_compressed(compress("gpt2", int8="static"), None, tmp_path / "a", {})
    save_compressed(load_compressed(tmp_path / "a"), None, tmp_path / "b", {})
    for name in ("model.safetensors", "compressft.safetensors", "config.json", "compressft.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def plainly_loaded(folder: Path, architecture: str):
    """The folder in transformers alone; every tensor must be found and fit."""
    model, loading = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="sdpa", dtype=torch.float32
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    return model.eval(), loading


@pytest.mark.parametrize(("family", "heads"), [("llama", 1), ("bert", None), ("gpt2", None), ("distilbert", None)])
def test_uniform_shapes_load_in_plain_transformers(family, heads, tmp_path):
    """FFN width everywhere; heads where the configuration has its own head_dim. Neurons are dropped in the middle."""
    model = tiny(family)
    kept = {"ffn": torch.arange(3, 43)} | ({"heads": torch.tensor([1])} if heads else {})
    shrink(model, [kept, kept])
    save_compressed(model, None, tmp_path / "model", {})
    plain, loading = plainly_loaded(tmp_path / "model", type(model).__name__)
    assert not loading["unexpected_keys"]
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    batch = batch_for(family)
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-5)


def test_uniform_and_quantised_weights_load_in_plain_transformers(tmp_path):
    """The folder's main file has nothing that transformers does not know."""
    model = compress("bert", int8="static", prune=False)
    save_compressed(model, None, tmp_path / "model", {})
    plain, loading = plainly_loaded(tmp_path / "model", "BertForSequenceClassification")
    assert not loading["unexpected_keys"]
    assert torch.equal(plain.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)


def test_only_safetensors_and_json(tmp_path):
    save_compressed(compress("bert", int8="static", adapter="houlsby"), None, tmp_path / "model", {})
    assert {p.suffix for p in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("name", ["model.safetensors", "compressft.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_tampering_is_refused(tmp_path, name, damage):
    save_compressed(compress("bert", int8="static"), None, tmp_path / "model", {})
    path = tmp_path / "model" / name
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(raw[:-3] if damage == "truncated" else raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(UserError, match=name):
        load_compressed(tmp_path / "model")


def test_folder_of_somebody_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"compressft\.json"):
        load_compressed(tmp_path)
    (tmp_path / "compressft.json").write_text('{"format": 1,')
    with pytest.raises(UserError, match="truncated or changed"):
        load_compressed(tmp_path)


def test_content_hash_sees_name_type_shape_and_value():
    one = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    assert content_hash(one) == content_hash(dict(reversed(one.items())))
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"].view(2, 3), "b": one["b"]},
        {"a": one["a"].int(), "b": one["b"]},
        {"a": one["a"] + torch.eye(6)[5], "b": one["b"]},
        {"a": one["a"], "b": -one["b"]},
    ]
    assert len({content_hash(x) for x in [one, *others]}) == len(others) + 1


# Deltas.


@pytest.fixture
def base(tmp_path) -> Path:
    """A pretrained BERT without a head, as a folder."""
    tiny("bert", architecture="BertModel").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fine_tuned(base: Path, **options) -> nn.Module:
    model = load_model(str(base), "AutoModelForSequenceClassification", num_labels=3)
    if options.get("adapter"):
        Adapter(placement=options["adapter"], size=5).prepare(model, Context())
    return model.eval()


def test_delta_has_exactly_what_changed(base, tmp_path):
    model = fine_tuned(base)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.bias[3] += 0.5
    save_delta(model, None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    assert set(stored) == {
        "bert.encoder.layer.1.attention.self.query.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert torch.equal(logits(load_delta(tmp_path / "delta"), batch_for("bert")), logits(model, batch_for("bert")))


def test_delta_of_adapters_is_small(base, tmp_path):
    model = fine_tuned(base, adapter="pfeiffer")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(0.1)
    save_delta(model, None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    assert all("adapter" in name or name.startswith("classifier") for name in stored)
    assert sum("adapter" in name for name in stored) == 2 * 4
    assert torch.equal(logits(load_delta(tmp_path / "delta"), batch_for("bert")), logits(model, batch_for("bert")))


def test_delta_of_a_compressed_model(base, tmp_path):
    """Pruned tensors have another shape than the base's; ranges of the quantizers travel too."""
    model = fine_tuned(base)
    shrink(model, random_keep(model))
    transform = Int8()
    transform.prepare(model, Context())
    with torch.no_grad():
        model.train()(**batch_for("bert"))
    transform.finalize(model)
    model.eval()
    save_delta(model, None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    save_compressed(model, None, tmp_path / "model", {})
    loaded, whole = load_delta(tmp_path / "delta"), load_compressed(tmp_path / "model")
    assert loaded.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    stored = load_file(tmp_path / "delta" / "delta.safetensors")
    assert "bert.embeddings.word_embeddings.weight" not in stored


def test_delta_knows_its_base(base, tmp_path):
    model = fine_tuned(base)
    save_delta(model, None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    recorded = json.loads((tmp_path / "delta" / "compressft.json").read_text())["base_hash"]
    # From the base's own file: a moved base is found, another one refused.
    raw = load_file(base / "model.safetensors")
    assert recorded == content_hash({f"bert.{name}": value for name, value in raw.items()})
    moved = base.rename(tmp_path / "moved")
    assert torch.equal(
        logits(load_delta(tmp_path / "delta", str(moved)), batch_for("bert")), logits(model, batch_for("bert"))
    )
    raw["encoder.layer.0.output.dense.bias"][0] += 1e-3
    save_file(raw, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another base"):
        load_delta(tmp_path / "delta", str(moved))


def test_tampered_delta_is_refused(base, tmp_path):
    save_delta(fine_tuned(base), None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    path = tmp_path / "delta" / "delta.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 64]))
    with pytest.raises(UserError, match=r"delta\.safetensors"):
        load_delta(tmp_path / "delta")


def test_delta_of_a_compressed_base(tmp_path):
    """A `model/` folder of ours is a base as well."""
    save_compressed(compress("bert", int8="static"), None, tmp_path / "base", {})
    model = load_compressed(tmp_path / "base")
    with torch.no_grad():
        model.classifier.bias += 1
    save_delta(model, None, base_tensors(str(tmp_path / "base")), tmp_path / "delta", {"model": str(tmp_path / "base")})
    assert set(load_file(tmp_path / "delta" / "delta.safetensors")) == {"classifier.bias"}
    assert torch.equal(logits(load_delta(tmp_path / "delta"), batch_for("bert")), logits(model, batch_for("bert")))


def test_plain_state_has_the_layout_of_the_family():
    """GPT-2's Conv1D weights are (in, out) on disk, also while they are ours."""
    plain = plain_state(tiny("gpt2"))[0]
    compressed = compress("gpt2", int8="static", prune=False)
    ours, extra = plain_state(compressed)
    assert {name: tuple(t.shape) for name, t in ours.items()} == {name: tuple(t.shape) for name, t in plain.items()}
    assert all("quantizer" in name for name in extra) and extra


# Atomic writes.


def test_failed_write_leaves_the_old_folder(tmp_path):
    write_atomically(tmp_path / "f", lambda target: (target / "x").write_text("old"))

    def fail(target: Path) -> None:
        (target / "x").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "f", fail)
    assert (tmp_path / "f" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_write_replaces_the_whole_folder(tmp_path):
    write_atomically(tmp_path / "f", lambda target: (target / "x").write_text("old"))
    (tmp_path / ".f.tmp").mkdir()
    (tmp_path / ".f.tmp" / "left").write_text("behind")
    write_atomically(tmp_path / "f", lambda target: (target / "y").write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert [p.name for p in (tmp_path / "f").iterdir()] == ["y"]
