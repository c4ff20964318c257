"""Every method on a real pretrained Llama with grouped-query attention: it learns Shakespeare and generates."""

from pathlib import Path

import pytest
import torch

from compressft.methods import METHODS
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.source import load_tokenizer
from compressft.transform import Context, TrainingData
from tests.methods.added import save_adapter
from tests.share import drawn
from tests.tiny import fit

pytestmark = pytest.mark.dear

ASSETS = Path(__file__).parents[1] / "assets"
STORIES = str(ASSETS / "stories260K")
FIELDS = {
    "layers": {"top": 2},
    "adapter": {"size": 8},
    "prefix": {"length": 5, "reparameterise": False, "initial": "Once upon a time there"},
    "peft": {"config": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}},
    "diff": {"density": 0.05, "end": 0.5, "learning_rate": 2e-3},
    "task_vector": {"encoding": "sign"},
    "head_gates": {"decide": "importance", "heads": 0.2, "end": 0.6},
    "side": {"network": "ladder"},
    "lsh_attention": {"chunk": 16, "rounds": 2},
}
# What classifies one text has no next token to predict.
CLASSIFIERS = {"probe"}
LEARNING = {"full": 1e-3, "task_vector": 1e-3, "head_gates": 1e-3, "layers": 1e-3, "scalar_mix": 1e-3, "mask": 1e-2}


@pytest.fixture(scope="module")
def blocks():
    """24 training batches and a held-out one of Shakespeare, (8, 64) each."""
    tokenizer = load_tokenizer(STORIES)
    text = (ASSETS / "tinyshakespeare.txt").read_text(encoding="utf-8")[:40000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: 200 * 64]).view(25, 8, 64)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids]
    features = [{"input_ids": row.tolist()} for row in ids[0]]
    return batches[1:], batches[0], TrainingData(tokenizer, features, None, lambda tokenizer: features, 64)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / str(i), lambda: load_model(STORIES, "AutoModelForCausalLM"), seed=i) for i in (0, 1)]


@torch.no_grad()
def loss_of(model, batch):
    return float(model.eval()(**batch).loss)


@torch.no_grad()
def without_cache(model, ids, mask, tokens):
    """Greedy continuation, everything computed again for each token."""
    for _ in range(tokens):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


RUNS = {name: (name, {}) for name in METHODS if name not in CLASSIFIERS} | {
    "side, copy": ("side", {"network": "copy"}),
    # MAD-X's language adapter: invertible, its inverse in front of the output layer.
    "adapter, invertible": ("adapter", {"placement": "pfeiffer", "invertible": True}),
}


@pytest.mark.parametrize("case", drawn(2, RUNS, ("prefix",)))
def test_learns_and_generates(case, blocks, adapters, tmp_path):
    name, other = RUNS[case]
    train, held_out, data = blocks
    fields = {"adapters": adapters} if name == "fusion" else {**FIELDS.get(name, {}), **other}
    method = METHODS[name](**fields)
    model = load_model(STORIES, "AutoModelForCausalLM")
    method.prepare(model, Context((method,), data=data))
    # With the method in place: a mean of layers or a first mask costs something by itself.
    before = loss_of(model, held_out)
    fit(model, [method], train, 24, LEARNING.get(name, 5e-3), Context((method,), data=data))
    method.finalize(model)
    assert loss_of(model, held_out) < before - 0.03

    save_compressed(model, None, tmp_path / "model", {})
    again = load_compressed(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**held_out).logits, model(**held_out).logits)

    # Two prompts of different lengths, padded on the left.
    ids, mask = held_out["input_ids"][:2, :8].clone(), torch.ones(2, 8, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = 2, 0
    cached = again.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=2
    )
    assert torch.equal(cached, without_cache(again, ids, mask, 8))
