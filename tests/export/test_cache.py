"""A language model's file with a cache: names, greedy texts as torch writes them, and what methods and passes leave."""

from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch

from compressft.data.rows import read_rows
from compressft.errors import UserError
from compressft.evaluation.inputs import empty_past
from compressft.evaluation.logits import model_run, places
from compressft.evaluation.logits import scored as scored_by
from compressft.export import refuse
from compressft.export.cache import with_cache
from compressft.export.continuation import chunks, continue_rows, model_chunks, padded_left, session_chunks
from compressft.export.flow import Shipped, write_onnx
from compressft.export.fold import fold
from compressft.export.locate import diverging_layer
from compressft.export.onnx import save, to_graph
from compressft.methods import METHODS
from compressft.model.load import load_model
from compressft.model.shrink import shrink
from compressft.model.source import load_tokenizer
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.recipe.recipe import parse_recipe
from compressft.run.evaluate import evaluate
from compressft.tasks import make_task
from compressft.transform import Context
from tests.export.conftest import Pads, rows_for, settle
from tests.methods.test_stories import ASSETS, STORIES
from tests.share import drawn
from tests.tiny import padded, tiny
from tests.tiny_folder import document, write_jsonl

pytestmark = pytest.mark.dear

NEW = 72


def greedy(session, ids, mask):
    """`NEW` tokens by the file alone, as any runtime would write them: (B, NEW)."""
    names = [value.name for value in session.get_outputs()]
    past, given, found = empty_past(session.get_inputs(), len(ids)), ids, []
    where = np.maximum(mask.cumsum(1) - 1, 0)
    for _ in range(NEW):
        feed = {"input_ids": given, "attention_mask": mask, "position_ids": where, **past}
        out = dict(zip(names, session.run(None, feed), strict=True))
        given = out.pop("logits")[:, -1:].argmax(-1)
        found.append(given)
        mask = np.concatenate([mask, np.ones_like(given)], 1)
        where = mask.sum(1, keepdims=True) - 1
        past = {name.replace("present", "past_key_values"): value for name, value in out.items()}
    return np.concatenate(found, 1)


def by_torch(model, ids, mask):
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = model.generate(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **settings)
    return out[:, ids.shape[1] :].numpy()


def opened(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def exported(model, batch, path):
    save(to_graph(fold(model), with_cache(model, batch)), path)
    return opened(path)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """A real pretrained model with grouped-query attention, and the folder that ships."""
    folder = tmp_path_factory.mktemp("stories")
    model, tokenizer = load_model(STORIES, "AutoModelForCausalLM").eval(), load_tokenizer(STORIES)
    task = make_task("causal-lm", tokenizer, 24)
    text = (ASSETS / "tinyshakespeare.txt").read_text(encoding="utf-8")[:1000]
    features = task.encode(read_rows(write_jsonl(folder / "rows.jsonl", [{"text": text}])))
    recipe = parse_recipe(document(STORIES, folder / "rows.jsonl", task="causal-lm"))
    manifest = {"task": "causal-lm", "labels": [], "max_length": 24, "columns": {}, "metric": "perplexity", "model": ""}
    write_onnx(Shipped(recipe, folder, task, {"validation": features}, manifest), model, folder)
    return model, task, features, folder


def test_names_and_axes(stories):
    session = opened(stories[3] / "model.onnx")
    given = {value.name: value.shape for value in session.get_inputs()}
    found = {value.name: value.shape for value in session.get_outputs()}
    pairs = [f"{layer}.{part}" for layer in range(5) for part in ("key", "value")]
    assert list(given) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{pair}" for pair in pairs),
    ]
    assert list(found) == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert given["input_ids"] == given["position_ids"] == ["batch_size", "sequence_length"]
    assert given["attention_mask"] == ["batch_size", "total_sequence_length"]
    # Four heads of keys for eight of queries.
    assert given["past_key_values.4.value"] == ["batch_size", 4, "past_sequence_length", 8]
    assert found["present.4.value"] == ["batch_size", 4, "total_sequence_length", 8]


def test_a_real_model_writes_what_torch_writes(stories):
    model, _, features, folder = stories
    session = opened(folder / "model.onnx")
    one = np.array([[1]])
    np.testing.assert_array_equal(greedy(session, one, np.ones_like(one)), by_torch(model, one, np.ones_like(one)))
    rows = [features[0]["input_ids"][:9], features[1]["input_ids"][:2], features[2]["input_ids"][:5]]
    ids, mask = padded_left(rows, 0)
    written = greedy(session, ids, mask)
    np.testing.assert_array_equal(written, by_torch(model, ids, mask))
    # Nor does a row depend on those that it is padded next to.
    for row, text in zip(rows, written, strict=True):
        alone = greedy(session, np.array([row]), np.ones((1, len(row)), np.int64))
        np.testing.assert_array_equal(alone[0], text)


def test_everybody_feeds_it(stories):
    """Evaluation, the proof of the cache, and the search for a layer that diverges."""
    model, task, features, folder = stories
    scored = evaluate(folder, folder / "rows.jsonl")
    assert scored["perplexity"] == pytest.approx(
        scored_by(model_run(model, task), task, features)["perplexity"], rel=1e-4
    )
    batch = task.collate([{k: v for k, v in row.items() if k != "labels"} for row in features[:3]])
    assert diverging_layer(folder / "model.onnx", model, batch).startswith("all 5 layers agree")
    found = continue_rows(folder / "model.onnx", model, task, features)
    assert [(one.kernels, one.batch) for one in found] == [(k, b) for k in ("exact", "default") for b in (1, 1, 8)]
    assert all(one.token_agreement == 1.0 and one.max_abs_error < 1e-3 and not one.failure(1.0) for one in found)


def test_a_cache_that_is_not_the_models_is_found(stories):
    _, task, features, folder = stories
    other = load_model(STORIES, "AutoModelForCausalLM").eval()
    with torch.no_grad():
        other.model.layers[3].self_attn.v_proj.weight.mul_(-1.0)
    found = continue_rows(folder / "model.onnx", other, task, features)
    assert "behind its cache the file puts the trained model's token first in 0." in (found[0].failure(0.99) or "")


def test_gpt2_writes_what_torch_writes(tmp_path):
    model = tiny("gpt2", n_layer=1, n_positions=96, eos_token_id=None)
    session = exported(model, padded(2, 4), tmp_path / "model.onnx")
    batch = padded(4, 9, left=True)
    ids, mask = (batch[name].numpy() for name in ("input_ids", "attention_mask"))
    written = by_torch(model, ids, mask)
    assert len(np.unique(written)) > 5
    np.testing.assert_array_equal(greedy(session, ids, mask), written)
    np.testing.assert_array_equal(greedy(session, ids[:1], mask[:1]), written[:1])


def shaken(model):
    """Everything that a method added moved far enough to show."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model


def of(name, **fields):
    def build():
        method, model = METHODS[name](**fields), tiny("llama", num_hidden_layers=1)
        method.prepare(model, Context())
        shaken(model)
        method.finalize(model)
        return model

    return build


def quantised(transform):
    def build():
        model = tiny("llama", num_hidden_layers=1)
        task = make_task("causal-lm", Pads(), 16, [])
        settle(model, transform, task, rows_for(task, True))
        return model

    return build


def pruned():
    """Another number of key and value heads in each layer."""
    model = tiny("llama")
    first, second = ({"heads": torch.arange(n), "ffn": torch.arange(40 + n)} for n in (1, 2))
    shrink(model, [first, second])
    return model


CASES = {
    "lora": of("peft", config={"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}),
    "adapter": of("adapter", placement="pfeiffer", size=4, invertible=True),
    "prefix": of("prefix", length=3, reparameterise=False),
    "ladder": of("side", network="ladder"),
    "copy": of("side", network="copy"),
    "int8": quantised(Int8()),
    "dynamic": quantised(Int8(ranges="dynamic")),
    "qdq": quantised(Int8(format="qdq")),
    "int4": quantised(Int4()),
    "window": lambda: tiny("mistral", num_hidden_layers=1, sliding_window=4),
    "pruned": pruned,
}


@pytest.mark.parametrize("name", drawn(1, CASES, ("prefix",)))
def test_methods_and_passes_keep_their_cache(name, tmp_path):
    """A prompt, single tokens and several at once, padded on the left, behind what each of them leaves."""
    model = CASES[name]().eval()
    session = exported(model, padded(2, 4), tmp_path / "model.onnx")
    # A dynamic range is also the paddings', of which torch and onnxruntime make what they like.
    batch = padded(1 if name == "dynamic" else 4, 40, seed=5, left=True)
    parts = list(chunks(batch["input_ids"].numpy(), batch["attention_mask"].numpy()))
    assert [part.ids.shape[1] for part in parts] == [20, *[1] * 16, 4]
    want, got = model_chunks(model, parts), session_chunks(session, parts)
    real = batch["attention_mask"].bool().numpy()
    limit = 0.05 if name in ("int8", "dynamic", "qdq") else 1e-4
    assert np.abs(want - got)[real].max() < limit * want[real].std()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_past_of_each_row_counts(stories, batch):
    """Another past, another answer: what comes behind a cache is not what comes alone."""
    session = opened(stories[3] / "model.onnx")
    ids = np.array([row["input_ids"][:8] for row in stories[2][:batch]])
    with_past = session_chunks(session, list(chunks(ids, np.ones_like(ids))))[:, -1]
    alone = session_chunks(session, list(chunks(ids[:, -2:], np.ones_like(ids[:, -2:]))))[:, -1]
    assert (np.abs(with_past - alone).max(1) > 0.1).all()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny("bert", architecture="BertLMHeadModel", is_decoder=True), "bert counts places its own way"),
        (lambda: tiny("gpt2", add_cross_attention=True), "a gpt2 with cross-attention wants an encoder's states"),
    ],
)
def test_what_cannot_carry_a_cache_is_refused_before_training(model, reason, tmp_path):
    recipe = parse_recipe(document("x", "y", task="causal-lm"))
    with pytest.raises(UserError, match=f"export.cache: {reason}.*set export.cache to false"):
        refuse.refuse_model(recipe, model())
    for other in ({"cache": False}, {"enabled": False}):
        refuse.refuse_model(parse_recipe(document("x", "y", task="causal-lm", export=other)), model())


def test_padding_on_either_side_counts_no_place():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_array_equal(places(mask), [[0, 0, 0, 1], [0, 1, 2, 2]])


def test_an_empty_past_has_every_layers_own_shape():
    names = ("past_key_values.0.key", "past_key_values.1.key", "input_ids")
    values = [SimpleNamespace(name=name, shape=["b", 2 + i, "p", 8]) for i, name in enumerate(names)]
    shapes = [value.shape for value in empty_past(values, 3).values()]
    assert shapes == [(3, 2, 0, 8), (3, 3, 0, 8)]
