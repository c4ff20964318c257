"""Exports that other people's models need: windows, samples of one token, tiny vocabularies, foreign adapters."""

import json

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch

from compressft.adapters.named_adapters import Adapted
from compressft.errors import UserError
from compressft.evaluation.inputs import sample_inputs
from compressft.export.flow import sample_batch
from compressft.export.fold import fold
from compressft.export.measure import table_rows
from compressft.export.onnx import save, to_graph
from compressft.tasks import make_task
from tests.adapters.saved import loaded
from tests.export.conftest import Pads
from tests.tiny import tiny

pytestmark = pytest.mark.dear


@pytest.mark.parametrize("family", ["mistral", pytest.param("qwen2", marks=pytest.mark.full)])
def test_a_sliding_window_is_the_same_at_every_length(family, tmp_path):
    changes = {"sliding_window": 4}
    if family == "qwen2":
        changes |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 2}
    model = tiny(family, **changes).eval()
    rows = {"input_ids": torch.randint(5, 90, (2, 3)), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    save(to_graph(fold(model), rows), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    whole = tiny(family)
    whole.load_state_dict(model.state_dict())
    for length in (3, 4, 5, 12, 30):
        ids = torch.randint(5, 90, (2, length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 + 1 :] = 0
        got = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask).logits.numpy()
            without = whole(input_ids=ids, attention_mask=mask).logits.numpy()
        seen = mask.bool().numpy()
        np.testing.assert_allclose(got[seen], want[seen], atol=1e-5, rtol=1e-4)
        assert np.allclose(want[0], without[0], atol=1e-6) == (length <= 4), "the window matters beyond its size"


def test_a_sample_has_two_tokens():
    task = make_task("causal-lm", Pads(), 16, [])
    one = {"input_ids": [7], "attention_mask": [1], "labels": [7]}
    batch = sample_batch(task, {"validation": [one, one, one]})
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(batch, (2, 2))
    assert batch["attention_mask"].all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_made_up_rows_stay_inside_the_table(family, tmp_path):
    model = tiny(family).eval()
    rows = {"input_ids": torch.randint(5, 90, (2, 3)), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    graph = to_graph(fold(model), rows)
    # Neither keys nor values that nobody could give back.
    assert [value.name for value in graph.graph.outputs] == ["logits"]
    save(graph, tmp_path / "model.onnx")
    assert table_rows(tmp_path / "model.onnx") == model.get_input_embeddings().num_embeddings == 97
    ids = sample_inputs(["input_ids"], 8, 64, 97)["input_ids"]
    assert ids.min() == 0 and ids.max() == 96
    ids = sample_inputs(["input_ids"], 8, 64)["input_ids"]
    assert ids.min() >= 10 and 380 < ids.max() < 400


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("start", ["pissa", "olora", True])
def test_an_adapter_that_rewrites_its_base_is_refused(start, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", "AutoModelForCausalLM")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "theirs"))
    base = loaded(tmp_path / "base", "AutoModelForCausalLM")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    if start is True:
        Adapted.from_pretrained(base, str(tmp_path / "theirs"))
    else:
        with pytest.raises(UserError, match=f"init_lora_weights '{start}' rewrites the base"):
            Adapted.from_pretrained(base, str(tmp_path / "theirs"))
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["init_lora_weights"] == start
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_nothing_of_the_machine_that_exported_is_in_the_file(exported):
    for path in filter(None, (exported("int8").path, exported("int8").fused)):
        raw = path.read_bytes()
        for word in (b"pkg.torch", b"stack_trace", b"site-packages", b"fx_node", b"class_hierarchy", b".py", b"/work"):
            assert word not in raw, word
        model = onnx.load(str(path))
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names) and any(name.startswith("bert.encoder.layer.1.") for name in names)
        noted, tensors = ({one.name for one in of} for of in (model.graph.value_info, model.graph.initializer))
        assert not noted & tensors, "said twice"
        # Without these a session takes a quarter longer to open.
        assert noted >= {name for node in model.graph.node for name in node.output if name != "logits"}
