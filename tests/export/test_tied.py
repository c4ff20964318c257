"""A tied table is in the file once: what looks tokens up and what scores them read the same tensor."""

import numpy as np
import onnx
import pytest
import torch

from compressft.evaluation.logits import open_session
from compressft.export.cache import with_cache
from compressft.export.continuation import chunks, model_chunks, session_chunks
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.methods import METHODS
from compressft.model.costs import counted
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.modules.quantizer import TableQuantizer
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.tasks import make_task
from compressft.transform import Context
from tests.export.conftest import Pads, rows_for, settle
from tests.share import drawn
from tests.tiny import logits, padded, tiny

pytestmark = pytest.mark.dear

ROWS, WIDTH = 2000, 72
# Width 72: the blocks of four-bit rows do not end where the rows do.
PASSES = {
    "fp32": (None, 4 * ROWS * WIDTH),
    "int8": (Int8(), ROWS * (WIDTH + 4)),
    "int4": (Int4(embeddings="int4"), ROWS * 3 * (16 + 4)),
    "qdq, int4": (Int8(format="qdq", embeddings="int4"), ROWS * 3 * (16 + 4 + 4)),
}


def shaped(transform):
    """GPT-2's structure, its table the most of it."""
    model = tiny("gpt2", n_layer=1, vocab_size=ROWS, n_embd=WIDTH, n_head=4)
    if transform is not None:
        task = make_task("causal-lm", Pads(), 16, [])
        settle(model, transform, task, rows_for(task, True))
    return model.eval()


@pytest.mark.parametrize("name", drawn(1, PASSES, ("int8",)))
def test_the_file_holds_it_once(name, tmp_path):
    transform, expected = PASSES[name]
    model, path = shaped(transform), tmp_path / "model.onnx"
    save(to_graph(fold(model), with_cache(model, padded(2, 4))), path)
    tensors = onnx.load(str(path)).graph.initializer
    table = [t for t in tensors if t.dims and ROWS in t.dims]
    assert sum(onnx.numpy_helper.to_array(t).nbytes for t in table) == expected
    # The blocks' and positions' weights are few next to it.
    assert path.stat().st_size < expected + (260_000 if name == "fp32" else 110_000)
    batch = padded(3, 30, left=True)
    parts = list(chunks(batch["input_ids"].numpy(), batch["attention_mask"].numpy()))
    want, got = model_chunks(model, parts), session_chunks(open_session(path, 1), parts)
    real = batch["attention_mask"].bool().numpy()
    assert np.abs(want - got)[real].max() < (0.05 if isinstance(transform, Int8) else 1e-4) * want[real].std()


@pytest.mark.parametrize("transform", [Int8(), Int4(embeddings="int4", embedding_block=64)])
def test_training_multiplies_by_the_rows_that_ship(transform, tmp_path):
    model = shaped(transform)
    assert model.lm_head.weight is model.transformer.wte.weight
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = logits(model, padded(1, 6))
    rows = model.transformer.wte(torch.arange(ROWS))
    torch.testing.assert_close(found, (seen[0] @ rows.t())[0])
    assert not torch.equal(rows, model.transformer.wte.weight), "nothing was rounded"
    save_compressed(model, None, tmp_path / "model", {})
    again = load_compressed(tmp_path / "model")
    assert isinstance(again.lm_head.quantizer, TableQuantizer)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(logits(again, padded(1, 6)), found)


def test_both_uses_give_the_table_a_gradient():
    model = shaped(Int8()).requires_grad_(True)
    batch = padded(2, 6)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    grad = model.transformer.wte.weight.grad.abs().sum(1)
    used = torch.zeros(ROWS, dtype=torch.bool)
    used[batch["input_ids"].unique()] = True
    # Looked up or not, every row is scored.
    assert (grad > 0).all() and grad[used].mean() > grad[~used].mean()


def test_who_excludes_the_head_keeps_it():
    model = tiny("gpt2", n_layer=1)
    Int8(exclude=("lm_head",)).prepare(model, Context())
    assert type(model.lm_head) is torch.nn.Linear
    untied = tiny("llama", num_hidden_layers=1)
    Int8().prepare(untied, Context())
    assert type(untied.lm_head) is torch.nn.Linear


def test_what_stands_in_front_of_the_head_stays_there():
    """An invertible adapter is undone before the output layer, whoever rounds that."""
    model = tiny("gpt2", n_layer=1)
    METHODS["adapter"](placement="pfeiffer", size=4, invertible=True).prepare(model, Context())
    Int8().prepare(model, Context())
    seen = []
    model.transformer.invertible.inverse = lambda x: seen.append(x) or x
    logits(model, padded(1, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_counts_once(tied):
    """Targets in bytes see what ships."""
    model = tiny("llama", vocab_size=ROWS, tie_word_embeddings=tied)
    shape = {"kv_heads": 2, "ffn": 64}
    cost = counted(model, "bytes", "int8").cost([shape, shape])
    parameters = list(model.parameters())
    assert cost == sum(p.numel() + 4 * len(p) if p.dim() == 2 else 4 * p.numel() for p in parameters)
    assert sum(len(p) == ROWS for p in parameters) == (1 if tied else 2)
