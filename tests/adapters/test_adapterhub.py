"""AdapterHub's folders: what the `adapters` package (1.3.0) made and computed on the tiny BERT, and back again.

The folders and logits in `adapterhub/` were written by `benchmarks/parity/peer.py make` with that package.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressft.adapters.adapterhub.arrange import refusal
from compressft.adapters.adapterhub.config import ABSENT, MATTERS, config_of, fields_of
from compressft.adapters.adapterhub.write import write
from compressft.adapters.folders import read
from compressft.adapters.named_adapters import Adapted
from compressft.errors import UserError
from compressft.modules.bottleneck import BottleneckDesign
from tests.adapters.saved import adapted_on, batch_of, loaded, rewrite, same
from tests.methods.added import save_adapter, shaken
from tests.tiny import logits, tiny

MADE = Path(__file__).parent / "adapterhub"
CASES = ("houlsby", "pfeiffer", "pfeiffer_inv", "parallel", "prefix", "fusion")
SMALL = {"type": "adapter", "size": 5}


@pytest.fixture
def made(tmp_path):
    """A copy of what the package made."""
    return Path(shutil.copytree(MADE, tmp_path / "made"))


@pytest.mark.parametrize("case", CASES)
def test_computes_what_the_package_did(bases, case):
    want = load_file(MADE / "logits.safetensors")[case]
    adapted = Adapted.from_pretrained(loaded(bases()), MADE / case)
    got = logits(adapted, batch_of("bert"))
    assert float((got - want).abs().max()) < 1e-6
    assert float((logits(adapted.base_model, batch_of("bert")) - want).abs().max()) > 1e-2
    kind = {"prefix": "prefix", "fusion": "fusion"}.get(case, "adapter")
    assert list(adapted.trees) == ["default"] and adapted.methods["default"].type == kind


@pytest.mark.parametrize("case", CASES)
def test_written_again(bases, tmp_path, case):
    """The same tensors, fields that compute the same, and the same logits once it is read."""
    found = read(loaded(bases()), MADE / case)
    assert refusal(found) is None
    (tmp_path / case).mkdir()
    write(found, tmp_path / case)
    same(Adapted.from_pretrained(loaded(bases()), tmp_path / case), found.model)
    for name in ("adapter.safetensors", "model_adapter_fusion.safetensors"):
        if (MADE / case / name).is_file():
            old, new = load_file(MADE / case / name), load_file(tmp_path / case / name)
            # A fusion's adapters are named again.
            rename = {"pfeiffer_odd": "fusion_1", "pfeiffer": "fusion_0"} if case == "fusion" else {}
            for theirs, ours in rename.items():
                old = {key.replace(theirs, ours): tensor for key, tensor in old.items()}
            assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    entries = [json.loads((root / case / "adapter_config.json").read_text()) for root in (MADE, tmp_path)
               if case != "fusion"]  # fmt: skip
    for theirs in entries[:1]:
        ours = entries[1]
        assert {key: theirs[key] for key in ("name", "model_type", "model_class", "hidden_size")}.items() <= (
            {**ours, "model_class": theirs["model_class"]}.items()
        )
        if case != "prefix":
            idle = ("init_weights", "reduction_factor", "inv_adapter_reduction_factor")
            for key, value in ours["config"].items():
                assert key in idle or theirs["config"][key] == value, key


@pytest.mark.parametrize(
    ("width", "size"), [(32, 2), (32, 5), (384, 24), (384, 7), (768, 48), (17, 3), (8, 8), (8, 12)]
)
def test_reduction_factors(width, size):
    """The package computes the size as int(width // factor)."""
    config = config_of("houlsby", BottleneckDesign(width, size, "relu"), True, (width // 2, size))
    assert int(width // config["reduction_factor"]) == size
    assert int((width // 2) // config["inv_adapter_reduction_factor"]) == size


def test_factor_of_an_invertible_adapter(bases, tmp_path):
    """Embeddings may be narrower than the layers: the factor is of their half."""
    method = {**SMALL, "placement": "pfeiffer", "invertible": True}
    found = settled(bases, tmp_path, method, family="electra")
    (tmp_path / "theirs").mkdir()
    write(found, tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["config"]
    stored = load_file(tmp_path / "theirs" / "adapter.safetensors")
    size, width = stored["electra.invertible_adapters.theirs.F.0.weight"].shape
    assert width == 8 and int(width // config["inv_adapter_reduction_factor"]) == size


def test_fields_both_ways():
    for post_norm in (True, False):
        for placement in ("houlsby", "pfeiffer", *(["parallel"] if post_norm else [])):
            for activation in ("relu", "gelu", "gelu_tanh", "silu", "tanh"):
                config = config_of(placement, BottleneckDesign(32, 4, activation, 2.0), post_norm, None)
                found = fields_of(config, post_norm, "here")
                assert (found["placement"], found["activation"], found["scale"]) == (placement, activation, 2.0)


@pytest.mark.parametrize(
    ("family", "placement"),
    [(f, p) for f in ("roberta", "distilbert", "electra", "gpt2", "llama") for p in ("pfeiffer", "parallel", "prefix")],
)
def test_families_round_trip(bases, tmp_path, family, placement):
    classes = {"llama": "LlamaForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
    # AdapterHub takes a head's size from the hidden size.
    folder = bases(family, classes.get(family), **({"head_dim": 8} if family == "llama" else {}))
    fields = {**SMALL, "placement": placement}
    if placement == "prefix":
        fields = {"type": "prefix", "length": 3, "reparameterise": False, "shift_positions": False}
        if family == "llama":
            del fields["shift_positions"]
    adapted = adapted_on(folder, fields, family)
    adapted.save_pretrained(tmp_path / "ours")
    found = read(loaded(folder), tmp_path / "ours")
    if placement == "parallel" and family in ("gpt2", "llama"):
        assert "next to a pre-norm FFN" in refusal(found)
        return
    assert refusal(found) is None
    (tmp_path / "theirs").mkdir()
    write(found, tmp_path / "theirs")
    same(Adapted.from_pretrained(loaded(folder), tmp_path / "theirs"), adapted, family, 1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("original_ln_after", False),
        ("ln_before", True),
        ("ln_after", True),
        ("use_gating", True),
        ("cross_adapter", True),
        ("phm_layer", True),
        ("leave_out", [0]),
        ("non_linearity", "leakyrelu"),
        ("scaling", "learned"),
        ("scaling", "channel"),
        ("inv_adapter", "glow"),
        ("reduction_factor", {"0": 2, "default": 4}),
        ("residual_before_ln", "post_add"),
        ("residual_before_ln", False),
        ("original_ln_before", False),
        ("output_adapter", False),
        ("colour", "red"),
    ],
)
def test_fields_that_compute_something_else_are_refused(bases, made, name, value):
    path = made / "pfeiffer" / "adapter_config.json"
    rewrite(path, config={**json.loads(path.read_text())["config"], name: value})
    refused(bases, made / "pfeiffer", rf"config\.{name}")


@pytest.mark.parametrize("length", [None, 0, "ten", 2.5, True])
def test_wrong_prefix_length(bases, made, length):
    path = made / "prefix" / "adapter_config.json"
    config = {**json.loads(path.read_text())["config"], "prefix_length": length}
    rewrite(path, config={name: value for name, value in config.items() if value is not None})
    refused(bases, made / "prefix", f"config.prefix_length wants a number from 1, holds {length!r}")


def test_fusion_of_names_that_are_none(bases, made):
    rewrite(made / "fusion" / "adapter_fusion_config.json", adapter_names=[1])
    refused(bases, made / "fusion", "adapter_names wants a list of strings")


def test_every_field_is_known():
    """All fields of the package's configuration are read, refused or idle; none is looked past."""
    config = json.loads((MADE / "pfeiffer" / "adapter_config.json").read_text())["config"]
    assert set(MATTERS) | set(ABSENT) <= set(config)
    fields_of(config, True, "here")


@pytest.mark.parametrize(
    ("changes", "post_norm", "match"),
    [
        ({"original_ln_before": True}, False, "pre-norm model, where it adds the residual twice"),
        ({"is_parallel": True}, False, "pre-norm model, where it reads past the norm"),
        ({"is_parallel": True, "mh_adapter": True}, True, "mh_adapter true is not read"),
        ({"original_ln_before": True, "mh_adapter": True}, True, "next to mh_adapter is not read"),
    ],
)
def test_placements_that_are_refused(changes, post_norm, match):
    config = {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 16}
    with pytest.raises(UserError, match=match):
        fields_of({**config, **changes}, post_norm, "here")


def refused(bases, folder, match, **changes):
    with pytest.raises(UserError, match=match) as caught:
        Adapted.from_pretrained(loaded(bases(**changes)), folder)
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(bases, made):
    path = made / "pfeiffer" / "adapter_config.json"
    values = json.loads(path.read_text())
    for changes, match in (
        ({"version": None}, "has no version"),
        ({"model_type": "roberta"}, "model_type 'roberta'"),
        ({"hidden_size": 64}, "hidden_size 64"),
        ({"config": {"architecture": "lora", "r": 8}}, r"architecture 'lora' is not read; bottlenecks"),
        ({"config": "pfeiffer"}, "config wants an object"),
        ({"name": None}, "name wants a string, holds None"),
        ({"name": 3}, "name wants a string, holds 3"),
        ({"name": "other"}, "'bert.encoder.layer.0.output.adapters.other.adapter_down.0.bias' is missing"),
    ):
        path.write_text(json.dumps(values))
        rewrite(path, **changes)
        refused(bases, made / "pfeiffer", match)
    path.write_text(json.dumps(values))
    file = made / "pfeiffer" / "adapter.safetensors"
    tensors = load_file(file)
    key = "bert.encoder.layer.1.output.adapters.pfeiffer.adapter_up.weight"
    save_file({**tensors, key: torch.zeros(32, 9)}, file)
    refused(bases, made / "pfeiffer", r"has shape \(32, 9\), wants \(32, 2\)")
    save_file({**tensors, "bert.other": torch.zeros(1)}, file)
    refused(bases, made / "pfeiffer", "'bert.other' has no place here")
    file.unlink()
    refused(bases, made / "pfeiffer", "adapter.safetensors: is missing")
    prefix = made / "prefix" / "adapter_config.json"
    rewrite(prefix, config={**json.loads(prefix.read_text())["config"], "use_gating": True})
    refused(bases, made / "prefix", r"config\.use_gating True is not read")


def test_heads(bases, made):
    """A head of another class or shape, and the one with the model's own pooler."""
    folder = made / "pfeiffer"
    path, file = folder / "head_config.json", folder / "model_head.safetensors"
    values, tensors = json.loads(path.read_text()), load_file(file)
    rewrite(path, config={**values["config"], "activation_function": "relu"})
    refused(bases, folder, "is no head that a BertForSequenceClassification can have")
    rewrite(path, config={**values["config"], "layers": 1, "use_pooler": True})
    one = {f"heads.pfeiffer.1.{part}": tensors[f"heads.pfeiffer.4.{part}"] for part in ("weight", "bias")}
    save_file(one, file)
    adapted = Adapted.from_pretrained(loaded(bases()), folder)
    assert torch.equal(adapted.model.classifier.weight, one["heads.pfeiffer.1.weight"])
    assert adapted.model.bert.pooler.dense.weight is adapted.base_model.bert.pooler.dense.weight
    save_file({**one, "heads.pfeiffer.9.weight": torch.zeros(1)}, file)
    refused(bases, folder, r"'heads\.pfeiffer\.9\.weight' is no part of the head")
    path.unlink()
    bare = Adapted.from_pretrained(loaded(bases()), folder)
    assert bare.model.classifier.weight is bare.base_model.classifier.weight


def test_a_head_of_another_class(bases, made):
    with pytest.raises(UserError, match="is the head of a BertForSequenceClassification, the model here is a BertForT"):
        Adapted.from_pretrained(loaded(bases(), "AutoModelForTokenClassification"), made / "parallel")


def test_saved_without_a_head(bases, made):
    """From a model without head the names lack its name for the backbone."""
    folder = made / "houlsby"
    tensors = load_file(folder / "adapter.safetensors")
    want = Adapted.from_pretrained(loaded(bases()), folder)
    save_file({name.removeprefix("bert."): tensor for name, tensor in tensors.items()}, folder / "adapter.safetensors")
    same(Adapted.from_pretrained(loaded(bases()), folder), want)
    # And onto one.
    (folder / "head_config.json").unlink()
    bare = Adapted.from_pretrained(loaded(bases(), "AutoModel"), folder)
    with torch.no_grad():
        got, expected = (m(**batch_of("bert")).last_hidden_state for m in (bare, want.model.bert))
    assert torch.equal(got, expected)


def test_pickled(bases, made):
    folder = made / "houlsby"
    want = Adapted.from_pretrained(loaded(bases()), folder)
    for safe, pickled in (("adapter", "pytorch_adapter"), ("model_head", "pytorch_model_head")):
        torch.save(load_file(folder / f"{safe}.safetensors"), folder / f"{pickled}.bin")
        (folder / f"{safe}.safetensors").unlink()
    same(Adapted.from_pretrained(loaded(bases()), folder), want)
    torch.save({"a": print}, folder / "pytorch_adapter.bin")
    refused(bases, folder, "cannot be read as tensors")


def test_fusions_that_are_refused(bases, made):
    folder = made / "fusion"
    path = folder / "adapter_fusion_config.json"
    values = json.loads(path.read_text())
    for name, value in (("temperature", True), ("value", False), ("residual_before", True), ("query_before_ln", True)):
        rewrite(path, config={**values["config"], name: value})
        refused(bases, folder, rf"config\.{name} {value} is not read")
    path.write_text(json.dumps(values))
    one = folder / "pfeiffer" / "adapter_config.json"
    entry = json.loads(one.read_text())
    rewrite(one, config={**entry["config"], "non_linearity": "gelu"})
    refused(bases, folder, "have activations gelu, relu")
    rewrite(one, config={**entry["config"], "scaling": 2.0})
    refused(bases, folder, "is no seq_bn of scaling 1")
    one.write_text(json.dumps(entry))
    # Next to the fusion, as save_all_adapters leaves them.
    want = Adapted.from_pretrained(loaded(bases()), folder)
    shutil.move(folder / "pfeiffer_odd", made / "pfeiffer_odd")
    same(Adapted.from_pretrained(loaded(bases()), folder), want)
    shutil.rmtree(made / "pfeiffer_odd")
    refused(bases, folder, "its adapter 'pfeiffer_odd' is neither in")


def settled(bases, tmp_path, method, change=lambda model: None, family="bert", architecture=None):
    folder = bases(family, architecture)
    adapted = adapted_on(folder, method, family)
    change(adapted.model)
    adapted.save_pretrained(tmp_path / "x")
    return read(loaded(folder), tmp_path / "x")


def test_what_the_format_cannot_hold(bases, tmp_path):
    assert "trained LayerNorms" in refusal(settled(bases, tmp_path / "a", SMALL))
    shifted = {"type": "prefix", "length": 3, "shift_positions": True}
    assert "this prefix moves them" in refusal(settled(bases, tmp_path / "b", shifted))
    for number, method in enumerate(({"type": "scalar_mix"}, {"type": "layers", "top": 1}, {"type": "peft"})):
        assert "adapters of placement" in refusal(settled(bases, tmp_path / f"c{number}", method))
    folders = [save_adapter(tmp_path / str(i), lambda: tiny(), seed=i) for i in (0, 1)]
    stack = {**SMALL, "placement": "pfeiffer", "stack": folders}
    assert "adapters of placement" in refusal(settled(bases, tmp_path / "d", stack))
    pfeiffer = {**SMALL, "placement": "pfeiffer"}

    def pruned(model):
        query = model.bert.encoder.layer[0].attention.self.query
        query.weight = torch.nn.Parameter(query.weight * 0.5)

    assert "'bert.encoder.layer.0.attention.self.query.weight' is not the base's" in refusal(
        settled(bases, tmp_path / "e", pfeiffer, pruned)
    )
    assert "not for 'camembert'" in refusal(settled(bases, tmp_path / "f", pfeiffer, family="camembert"))
    wide = settled(bases, tmp_path / "g", {"type": "prefix", "length": 3}, family="llama",
                   architecture="LlamaForSequenceClassification")  # fmt: skip
    assert "hidden_size / heads" in refusal(wide)

    def uneven(model):
        shaken(model, "adapter")
        model.bert.encoder.layer[1].output.LayerNorm.adapter.scale = 2.0

    assert "different sizes, activations or scales" in refusal(settled(bases, tmp_path / "h", pfeiffer, uneven))
