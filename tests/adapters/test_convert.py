"""`compressft convert`: run directories and adapters of three packages into each other, and what is said where not."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from compressft import get_model
from compressft.adapters.named_adapters import Adapted
from compressft.methods.fusion import Fusion
from compressft.model.saved.adapters import read_adapters
from compressft.model.saved.delta import base_tensors, save_delta
from compressft.recipe.recipe import parse_recipe
from tests.adapters.saved import LORA, config_of, loaded, moved, rewrite, same
from tests.methods.added import save_adapter
from tests.tiny import tiny
from tests.tiny_folder import document

MADE = Path(__file__).parent / "adapterhub"
PFEIFFER = {"type": "adapter", "placement": "pfeiffer", "size": 4}
PREFIX = {"type": "prefix", "length": 3, "hidden": 8, "shift_positions": True}


@pytest.fixture
def call(call):
    """Runs `compressft convert`."""
    return lambda *arguments: call("convert", *arguments)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def run(base, tmp_path):
    """A finished run's directory, as far as it says what was trained, and the trained model."""

    def run(method, name="run", change=None):
        folder = tmp_path / name
        folder.mkdir()
        stages = [{"name": "only", "method": method}]
        recipe = parse_recipe(document(base, "rows.jsonl", stages=stages), "here")
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        adapted = moved(get_model(loaded(base), method))
        model = adapted.settled()
        if change is not None:
            change(model)
        info = {"model": str(base), "recipe_hash": recipe.hash}
        save_delta(model, None, base_tensors(str(base)), folder / "delta", info)
        return folder, model

    return run


def test_a_runs_prefix_for_peft_and_back(call, run, base, tmp_path):
    folder, model = run(PREFIX)
    done = call(folder, "theirs")
    assert (done.code, done.err.splitlines()[:0]) == (0, []) and "delta -> peft: theirs" in done.out
    assert f"load it with peft.PeftModel.from_pretrained(model, '{Path('theirs')}')" in done.out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(PeftModel.from_pretrained(loaded(base), "theirs").eval(), model, limit=1e-5)
    done = call("theirs", "ours")
    assert done.code == 0 and "peft -> compressft: ours" in done.out
    same(Adapted.from_pretrained(loaded(base), "ours"), model, limit=1e-6)
    assert config_of(tmp_path / "ours")["compressft"]["base"] == str(base)


def test_a_runs_lora(call, run, base, tmp_path):
    folder, model = run(LORA)
    assert call(folder / "delta", "theirs").code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(PeftModel.from_pretrained(loaded(base), "theirs").eval(), model, limit=1e-5)
    assert call("theirs", "ours").code == 0
    assert config_of(tmp_path / "ours")["compressft"]["method"]["config"]["r"] == 4
    same(Adapted.from_pretrained(loaded(base), "ours"), model, limit=1e-6)


def test_a_runs_adapter_for_adapterhub(call, run, base):
    folder, model = run(PFEIFFER)
    done = call(folder, "theirs")
    assert done.code == 0 and "delta -> adapterhub: theirs" in done.out
    assert "model.load_adapter('theirs', use_safetensors=True, set_active=True) (model: AutoAdapterModel" in done.out
    assert sorted(path.name for path in Path("theirs").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
        "head_config.json",
        "model_head.safetensors",
    ]
    assert config_of(Path("theirs"))["name"] == "theirs"
    assert call("theirs", "ours").code == 0
    same(Adapted.from_pretrained(loaded(base), "ours"), model)
    # The run's own folder, as an adapter.
    same(Adapted.from_pretrained(loaded(base), folder), model)
    assert Adapted.from_pretrained(loaded(base), folder).methods["default"].placement == "pfeiffer"


def test_ours_to_ours(call, run, base):
    folder, model = run({"type": "mask"})
    assert call(folder, "ours", "--to", "compressft").code == 0
    same(Adapted.from_pretrained(loaded(base), "ours"), model)


@pytest.mark.parametrize("case", ["houlsby", "pfeiffer", "fusion", "prefix"])
def test_adapterhub_becomes_ours_and_again_theirs(call, base, case):
    done = call(MADE / case, "ours", "--base", base)
    assert done.code == 0 and "-> compressft: ours" in done.out
    want = Adapted.from_pretrained(loaded(base), MADE / case)
    same(Adapted.from_pretrained(loaded(base), "ours"), want)
    assert call("ours", "again", "--to", "adapterhub").code == 0
    same(Adapted.from_pretrained(loaded(base), "again"), want)


def test_converted_adapters_can_be_fused_and_stacked(call, base):
    for name in ("pfeiffer", "pfeiffer_odd"):
        assert call(MADE / "fusion" / name, name, "--base", base).code == 0
    model = loaded(base)
    found = read_adapters(model, ["pfeiffer", "pfeiffer_odd"], "here")
    assert [one.layers[0][0].down_weight.shape[0] for one in found] == [2, 6]
    fused = get_model(model, Fusion(adapters=("pfeiffer", "pfeiffer_odd")))
    made = Adapted.from_pretrained(loaded(base), MADE / "fusion")
    for layer in range(2):
        ours, theirs = (m.model.bert.encoder.layer[layer].output.LayerNorm.adapter for m in (fused, made))
        assert torch.equal(ours.up_weight, theirs.up_weight) and ours.sizes == theirs.sizes


def test_a_pickled_adapter(call, base):
    shutil.copytree(MADE / "prefix", "theirs")
    assert call("theirs", "ours", "--base", base).code == 0
    torch.save(print, "theirs/pytorch_adapter.bin")
    done = call("theirs", "other", "--base", base)
    assert done.code == 2 and "cannot be read as tensors" in done.err and not Path("other").exists()


def test_another_number_of_labels(call, tmp_path, base):
    """The head says how many labels there are; a base without a head takes any number."""
    bare = tmp_path / "bare"
    tiny(architecture="BertModel").save_pretrained(bare)
    adapted = moved(get_model(loaded(bare, num_labels=5), LORA))
    adapted.save_pretrained("theirs")
    assert call("theirs", "ours").code == 0
    assert config_of(Path("ours"))["compressft"]["labels"].keys() == {"0", "1", "2", "3", "4"}
    same(Adapted.from_pretrained(loaded(bare, num_labels=5), "ours"), adapted, limit=1e-6)
    refused(call, "--base: its head has other shapes than the adapter's", "theirs", "dst", "--base", base)


def refused(call, match, *arguments):
    done = call(*arguments)
    assert done.code == 2 and done.out == "", done
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and match in lines[0], done.err
    assert len(arguments) < 2 or not Path(arguments[1]).exists() or any(Path(arguments[1]).iterdir())


def test_refused(call, run, base, tmp_path):
    folder, _ = run({"type": "adapter", "size": 4})
    refused(call, "is no folder; give a run directory", "nowhere", "dst")
    refused(call, "--to 'pefft': wants one of compressft, peft, adapterhub (did you mean 'peft'?)", folder, "dst",
            "--to", "pefft")  # fmt: skip
    refused(call, "--to peft: PEFT's format has no place for method adapter", folder, "dst", "--to", "peft")
    # Default: neither can hold it, and both say why.
    refused(call, "AdapterHub's format has no place for trained LayerNorms", folder, "dst")
    refused(call, "PEFT's format has no place for ", folder, "dst")
    Path("full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    refused(call, "DST 'full': is not empty", folder, "full")
    path = folder / "recipe.yaml"
    path.write_text(path.read_text().replace("epochs: 3", "epochs: 2"))
    refused(call, f"{path}: is not the recipe that was trained", folder, "dst")
    (folder / "recipe.yaml").unlink()
    refused(call, "is no folder" if not folder.is_dir() else "adapter_config.json: is missing", folder, "dst")
    refused(call, "does not say which method made it", folder / "delta", "dst", "--to", "compressft")
    manifest = folder / "delta" / "compressft.json"
    rewrite(manifest, kind="model")
    refused(call, "is a 'model' folder of ours, no adapter", folder / "delta", "dst")


def test_the_base(call, base, tmp_path):
    refused(call, "--base: ", MADE / "pfeiffer", "dst")
    refused(call, "--base: model: folder './nowhere' does not exist", MADE / "pfeiffer", "dst", "--base", "./nowhere")
    other = tmp_path / "other"
    tiny(seed=4).save_pretrained(other)
    moved(get_model(loaded(base), PFEIFFER)).save_pretrained("ours")
    refused(call, "made on another base than the model here", "ours", "dst", "--base", other)
    roberta = tmp_path / "roberta"
    tiny("roberta").save_pretrained(roberta)
    refused(call, "model_type 'bert', the model's is 'roberta'", MADE / "pfeiffer", "dst", "--base", roberta)


def test_a_base_of_another_family(call, base, tmp_path):
    moved(get_model(loaded(base), PFEIFFER)).save_pretrained("ours")
    for family in ("gpt2", "distilbert"):
        tiny(family).save_pretrained(tmp_path / family)
        part = f"is a '{family}' model, the adapter was trained on a 'bert' (BertForSequenceClassification)"
        refused(call, part, "ours", "dst", "--base", tmp_path / family)


def test_a_run_that_also_compressed(call, run, base, tmp_path):
    """Pruned weights belong to the run: neither package has a place for them, our own format has."""

    def prune(model):
        weight = model.bert.encoder.layer[0].attention.self.query.weight
        weight.data = weight.data * (weight.data > 0)

    folder, model = run(PFEIFFER, change=prune)
    refused(call, "'bert.encoder.layer.0.attention.self.query.weight' is not the base's any more", folder, "dst")
    assert call(folder, "ours", "--to", "compressft").code == 0
    same(Adapted.from_pretrained(loaded(base), "ours"), model)


def test_a_run_that_is_not_finished(call, run):
    folder, _ = run(PFEIFFER)
    shutil.rmtree(folder / "delta")
    refused(call, "the run has not finished", folder, "dst")


def test_a_delta_of_another_base(base, tmp_path):
    from compressft.errors import UserError

    folder = tmp_path / "delta"
    save_adapter(folder, lambda: tiny())
    with pytest.raises(UserError, match="another base than the model here"):
        Adapted.from_pretrained(tiny(seed=7), folder)
    values = json.loads((folder / "compressft.json").read_text())
    rewrite(folder / "compressft.json", shapes=values["shapes"][:1])
    with pytest.raises(UserError, match="changed the number of layers"):
        Adapted.from_pretrained(tiny(), folder)
