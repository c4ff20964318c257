"""Every method through the export: from a saved folder to a file with the trained model's logits, its part in it."""

import pytest
import torch

from compressft.export.onnx import operators
from compressft.methods.adapter import Adapter
from compressft.methods.fusion import Fusion
from compressft.methods.head_gates import HeadGates
from compressft.methods.peft import Peft
from compressft.methods.probe import Probe
from compressft.methods.scalar_mix import ScalarMix
from compressft.model.saved.compressed import load_compressed, save_compressed
from tests.methods.added import check_export, headed, rows_for, save_adapter
from tests.methods.test_methods import CASES
from tests.passes.sparse import Run
from tests.share import drawn
from tests.tiny import logits

pytestmark = pytest.mark.dear

NAMES = ("peft", "mask", "diff", "task_vector", "parallel", "side", "ladder", "prefix")
METHODS = {name: CASES[name] for name in NAMES}
METHODS |= {
    "ia3": Peft(config={"peft_type": "IA3"}),
    "head gates": HeadGates(end=0.6, penalty=3.0, gate_lr=1.6),
    "scalar mix": ScalarMix(normalise="row"),
    # The two-way LSTM as one node that takes each row's length.
    "mix, bilstm": Probe(head="bilstm", features="scalar_mix"),
}
# Of saved adapters.
METHODS |= {"fusion": Fusion, "stack": Adapter}


def base():
    return headed(num_hidden_layers=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return tuple(save_adapter(folder / str(i), base, seed=i) for i in (0, 1))


@pytest.mark.parametrize("name", drawn(2, METHODS, ("prefix", "mix, bilstm")))
def test_file_equals_the_trained_model(name, saved, tmp_path):
    method = METHODS[name]
    if method is Fusion:
        method = Fusion(adapters=saved)
    elif method is Adapter:
        method = Adapter(placement="pfeiffer", size=4, stack=saved[:1], invertible=True)
    # Such large steps that nothing is what it was.
    run = Run(base(), [method], 4, rows_for("bert"), learning_rate=5e-2).train()
    run.finalize()
    want = logits(run.model, rows_for("bert"))
    plain = base()
    head = {n: t for n, t in run.model.state_dict().items() if n.startswith(("classifier.", "bert.pooler."))}
    plain.load_state_dict(head, strict=False)
    assert (logits(plain, rows_for("bert")) - want).abs().max() > 0.05 * want.std(), "the head alone does it all"
    save_compressed(run.model, None, tmp_path / "model", {})
    shipped = load_compressed(tmp_path / "model")
    torch.testing.assert_close(logits(shipped, rows_for("bert")), want)
    graph = check_export(shipped, rows_for("bert"), tmp_path)
    # The fused operator in both networks.
    assert operators(graph)["MultiHeadAttention"] == (2 if name == "side" else 1)
