"""Embeddings: how tokens become one vector, what the two losses ask of pairs, and how well texts find their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from compressft.data.rows import ROW_KEY
from compressft.errors import UserError
from compressft.evaluation.logits import model_logits, model_run, scored
from compressft.evaluation.scores import Scores
from compressft.model.anatomy import anatomy
from compressft.model.embedder import POOLING, class_named, embedding_class, gives_vectors, pooled
from compressft.model.heads import with_head
from compressft.model.load import load_empty, load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.objectives.distill import Distill
from compressft.passes.structured import Structured
from compressft.recipe.program import parse_task
from compressft.tasks import make_task
from compressft.tasks.embedding import OTHERS, ranking
from compressft.transform import Context, without_labels
from tests.tiny import TINY, VOCABULARY, tiny
from tests.tiny_folder import save_tiny

TEXTS = ["a short one", "where is the card that I ordered two weeks ago?", "hm"]
PAIRED = ["one that is short", "my card has not come yet", "hm hm"]


def rows_of(**columns):
    return [
        dict(zip(columns, values, strict=True)) | {ROW_KEY: f"f:{i}"}
        for i, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]


def task_of(tokenizer, **settings):
    return make_task(parse_task({"type": "embedding", **settings}), tokenizer, 32)


def embedder(family="bert", pooling="mean", **changes):
    """A tiny random model of a family that gives embeddings."""
    config = transformers.AutoConfig.for_model(family, **{"vocab_size": VOCABULARY, **TINY[family][1], **changes})
    if config.pad_token_id is None:
        config.pad_token_id = 0
    torch.manual_seed(0)
    return embedding_class(type(config))(config, pooling=pooling).eval()


# One vector of many tokens.


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("left", [False, True])
def test_paddings_on_either_side_do_not_count(how, left):
    states = torch.randn(3, 6, 4, dtype=torch.float64)
    mask, wanted = torch.zeros(3, 6, dtype=torch.int64), []
    for row, length in enumerate((1, 4, 6)):
        own = slice(6 - length, 6) if left else slice(0, length)
        mask[row, own] = 1
        part = states[row, own]
        wanted.append({"mean": part.mean(0), "cls": part[0], "last": part[-1]}[how])
    states[mask == 0] = torch.nan if how != "mean" else 1e6
    torch.testing.assert_close(pooled(states, mask, how), torch.stack(wanted))
    whole = torch.randn(2, 5, 4)
    assert torch.equal(pooled(whole, None, how), pooled(whole, torch.ones(2, 5), how))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "llama", "qwen3", "gpt2"])
def test_a_checkpoint_of_any_head_gives_its_own_backbones_vectors(family, tmp_path):
    """Against transformers' backbone, loaded by itself from the same folder."""
    tiny(family).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "AutoModelForEmbedding", pad_token_id=0, pooling="mean").eval()
    backbone = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 90, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    with torch.no_grad():
        states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors = model(input_ids=ids, attention_mask=mask).logits
    wanted = torch.stack([states[0].mean(0), states[1, :4].mean(0)])
    torch.testing.assert_close(vectors, wanted / wanted.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert len(anatomy(model).layers) == 2 and anatomy(model).prefix
    assert class_named(type(model).__name__) is type(model)


def test_saved_models_open_again_and_in_transformers(tokenizer, tmp_path):
    model = embedder(pooling="last", vocab_size=len(tokenizer))
    save_compressed(model, tokenizer, tmp_path / "model", {})
    again = load_compressed(tmp_path / "model")
    ids = torch.randint(5, 90, (2, 6))
    assert type(again).__name__ == "BertForEmbedding" and getattr(again.config, POOLING) == "last"
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    plain = transformers.AutoModel.from_pretrained(tmp_path / "model", add_pooling_layer=False).eval()
    torch.testing.assert_close(plain(input_ids=ids).last_hidden_state, model.bert(input_ids=ids).last_hidden_state)


def test_shapes_without_weights_are_those_of_the_model(tmp_path):
    save_tiny(tmp_path)
    empty = load_empty(str(tmp_path), "AutoModelForEmbedding", pad_token_id=0, pooling="cls")
    full = load_model(str(tmp_path), "AutoModelForEmbedding", pad_token_id=0, pooling="cls")
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    assert getattr(empty.config, POOLING) == getattr(full.config, POOLING) == "cls"


def test_the_backbone_goes_on_under_another_head_and_back():
    masked, other = tiny("bert", architecture="BertForMaskedLM"), embedder()
    backbone = masked.bert
    model = with_head(masked, other, "stage")
    assert type(model).__name__ == "BertForEmbedding" and model.bert is backbone
    assert model(input_ids=torch.randint(5, 90, (2, 4))).logits.shape == (2, 32)
    back = with_head(model, tiny("bert", architecture="BertForMaskedLM"), "stage")
    assert back.bert is backbone and back(input_ids=torch.randint(5, 90, (2, 4))).logits.shape[-1] == VOCABULARY


def test_an_unknown_backbone_is_refused():
    with pytest.raises(UserError, match="no backbone"):
        embedding_class(type("OddConfig", (transformers.PretrainedConfig,), {}))


# Rows.


def test_batches_hold_all_first_texts_then_all_second_ones(tokenizer):
    task = task_of(tokenizer)
    features = task.encode(rows_of(text=TEXTS, text_b=PAIRED, negative=TEXTS[::-1]))
    batch = task.collate(features)
    assert batch["input_ids"].shape[0] == 9 and batch["labels"].isnan().all()
    for k, texts in enumerate((TEXTS, PAIRED, TEXTS[::-1])):
        for row, text in enumerate(texts):
            ids = tokenizer(text)["input_ids"]
            assert batch["input_ids"][3 * k + row, : len(ids)].tolist() == ids
            assert batch["attention_mask"][3 * k + row].sum() == len(ids)
    assert [task.length(one) for one in features] == [
        max(len(tokenizer(text)["input_ids"]) for text in three)
        for three in zip(TEXTS, PAIRED, TEXTS[::-1], strict=True)
    ]
    assert [task.tokens(one) for one in features] == [3 * task.length(one) for one in features]
    assert set(task.pieces(features[0])) == {
        i for text in (TEXTS[0], PAIRED[0], TEXTS[2]) for i in tokenizer(text)["input_ids"]
    }
    assert "labels" not in task.asked(batch) and "labels" not in task.inputs(features)
    assert all(OTHERS not in name for name in batch)


def test_outputs_by_row_do_not_depend_on_the_batch(tokenizer):
    task, model = task_of(tokenizer), embedder(vocab_size=len(tokenizer))
    features = task.encode(rows_of(text=TEXTS, text_b=PAIRED))
    alone, together = (model_logits(model, task, features, batch) for batch in (1, 3))
    for row, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert one.shape == (2, 32)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
        for k, text in enumerate((TEXTS[row], PAIRED[row])):
            vector = model(**tokenizer(text, return_tensors="pt")).logits[0].detach().numpy()
            np.testing.assert_allclose(one[k], vector, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "columns", "said"),
    [
        ({"loss": "similarity"}, {}, "f:1: has no score, which task.loss 'similarity' compares with"),
        ({"loss": "similarity"}, {"score": [0.5, 2.0, 1.0]}, "f:2: score 2 is outside of 0 to 1; set task.least"),
        ({"metric": "spearman", "most": 5}, {"score": [0.0, 5.0, -1.0]}, "f:3: score -1 is outside of 0 to 5"),
    ],
)
def test_scores_that_no_cosine_can_give_are_refused(tokenizer, settings, columns, said):
    with pytest.raises(UserError, match=said):
        task_of(tokenizer, **settings).encode(rows_of(text=TEXTS, text_b=PAIRED, **columns))


def test_a_correlation_with_scores_that_are_not_there_is_refused(tokenizer):
    task = task_of(tokenizer, metric="spearman")
    features = task.encode(rows_of(text=TEXTS, text_b=PAIRED))
    with pytest.raises(UserError, match="have no score, which task"):
        task.truth(features)
    assert task_of(tokenizer).truth(features).shape == (3,)


def test_a_compressed_model_is_pooled_as_the_task_says_and_another_tasks_refused(tokenizer, tmp_path):
    save_compressed(embedder(pooling="last", vocab_size=len(tokenizer)), tokenizer, tmp_path / "own", {})
    found = load_model(str(tmp_path / "own"), "AutoModelForEmbedding", pad_token_id=0, pooling="cls")
    assert getattr(found.config, POOLING) == "cls"
    save_compressed(tiny("bert", architecture="BertForMaskedLM"), tokenizer, tmp_path / "other", {})
    with pytest.raises(UserError, match="compressed for another task than embedding"):
        load_model(str(tmp_path / "other"), "AutoModelForEmbedding", pad_token_id=0, pooling="cls")


def test_settings_that_contradict_are_refused():
    with pytest.raises(ValueError, match=r"most: 1\.0 is not above least 2\.0"):
        parse_task({"type": "embedding", "least": 2.0})


# Losses.


def outputs_of(*parts):
    return {"logits": torch.nn.functional.normalize(torch.cat(parts), dim=-1)}


def stacked(task, tokenizer, **columns):
    return task.collate(task.encode(rows_of(**columns)))


@pytest.mark.parametrize("negatives", [False, True])
def test_contrastive_loss_is_cross_entropy_among_the_batches_texts(tokenizer, negatives):
    """Against a loop in float64, gradients too."""
    task = task_of(tokenizer, temperature=0.1)
    more = {"negative": ["no", "not this", "nor that"]} if negatives else {}
    batch = stacked(task, tokenizer, text=TEXTS, text_b=PAIRED, **more)
    raw = torch.randn(9 if negatives else 6, 8, dtype=torch.float64, requires_grad=True)
    twin = raw.detach().clone().requires_grad_()
    loss = task.loss(outputs_of(raw), batch)
    unit = [row / row.norm() for row in twin]
    terms = []
    for i in range(3):
        powers = [torch.exp(unit[i] @ other / 0.1) for other in unit[3:]]
        terms.append(-torch.log(powers[i] / sum(powers)))
    wanted = sum(terms) / 3
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(raw.grad, twin.grad)


def test_a_text_that_reads_the_same_is_no_wrong_answer(tokenizer):
    """Rows 0 and 2 have one second text: neither is told from the other by it."""
    task = task_of(tokenizer)
    batch = stacked(task, tokenizer, text=TEXTS, text_b=["yes", PAIRED[1], "yes"], negative=["yes", "no", "never"])
    raw = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)
    cosines = (outputs_of(raw)["logits"][:3] @ outputs_of(raw)["logits"][3:].t()) / 0.05
    # Of rows 0 and 2, the other's text and the negative that reads the same.
    for row, column in ((0, 2), (2, 0), (0, 3), (2, 3)):
        cosines = cosines.index_put((torch.tensor(row), torch.tensor(column)), torch.tensor(-1e9, dtype=torch.float64))
    wanted = torch.nn.functional.cross_entropy(cosines, torch.arange(3))
    torch.testing.assert_close(task.loss(outputs_of(raw), batch), wanted)


def test_similarity_loss_is_the_squared_error_of_cosines(tokenizer):
    task = task_of(tokenizer, loss="similarity", least=-1.0, most=3.0)
    batch = stacked(task, tokenizer, text=TEXTS, text_b=PAIRED, score=[-1.0, 1.0, 3.0])
    assert batch["labels"].tolist() == [0.0, 0.5, 1.0]
    raw = torch.randn(6, 8)
    cosines = torch.nn.functional.cosine_similarity(raw[:3], raw[3:])
    torch.testing.assert_close(task.loss(outputs_of(raw), batch), (cosines - batch["labels"]).square().mean())


def test_a_student_is_drawn_to_its_teachers_vectors(tokenizer):
    student, teacher = embedder(), embedder(hidden_size=32, intermediate_size=48)
    task = task_of(tokenizer)
    ids = torch.randint(5, 90, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(2)}
    objective = Distill(teacher="t", logits=2.0)
    context = Context((objective,), {"t": teacher})
    objective.prepare(student, context)
    outputs = student(**without_labels(batch))
    found = objective.loss(student, batch, outputs, context)["distill.logits"]
    wanted = (outputs.logits - teacher(**without_labels(batch)).logits).square().sum(-1).mean()
    torch.testing.assert_close(found, 2.0 * wanted)
    assert task.answers is False


# Metrics.


@given(st.integers(1, 12), st.integers(0, 10_000))
def test_ranks_are_those_of_counting(n, seed):
    generator = np.random.default_rng(seed)
    queries, candidates = generator.integers(-2, 3, (2, n, 3)).astype(np.float64)
    ranks = []
    for i in range(n):
        cosines = [float(queries[i] @ candidates[j]) for j in range(n)]
        ranks.append(1 + sum(one > cosines[i] for one in cosines))
    found = ranking(queries, candidates)
    assert found["accuracy"] == pytest.approx(sum(rank == 1 for rank in ranks) / n)
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in ranks if rank <= 10) / n)


def test_figures_of_batches_are_those_of_all_rows(tokenizer):
    model = embedder(vocab_size=len(tokenizer))
    rows = rows_of(text=TEXTS, text_b=PAIRED, score=[0.1, 0.9, 0.3])
    for settings, wanted in (({}, "mrr"), ({"loss": "similarity"}, "spearman"), ({"metric": "spearman"}, "spearman")):
        task = task_of(tokenizer, **settings)
        features = task.encode(rows)
        assert task.metric == wanted
        whole = scored(model_run(model, task), task, features, 3)
        assert scored(model_run(model, task), task, features, 2) == pytest.approx(whole)
        assert wanted in whole


def test_correlation_is_that_of_the_cosines(tokenizer):
    from scipy.stats import spearmanr

    task = task_of(tokenizer, loss="similarity")
    vectors = torch.nn.functional.normalize(torch.randn(20, 2, 5), dim=-1)
    wanted = torch.rand(20)
    scores = Scores(task)
    scores.add(vectors[:12], wanted[:12])
    scores.add(vectors[12:], wanted[12:])
    cosines = (vectors[:, 0] * vectors[:, 1]).sum(-1)
    assert scores.metrics()["spearman"] == pytest.approx(spearmanr(cosines, wanted)[0])


# The folder in sentence-transformers.


@pytest.fixture
def saved(tokenizer, tmp_path):
    def save(*passes, **changes):
        model = embedder(vocab_size=len(tokenizer), **changes)
        for one in passes:
            one.prepare(model, Context())
            one.after_step(model, 1.0)
            one.finalize(model)
        save_compressed(model, tokenizer, tmp_path / "model", {"max_length": 32})
        return tmp_path / "model"

    return save


@pytest.mark.parametrize(("how", "mode"), [("mean", "mean_tokens"), ("cls", "cls_token"), ("last", "lasttoken")])
def test_the_folder_says_what_sentence_transformers_reads(saved, how, mode):
    folder = saved(pooling=how)

    def read(name):
        return json.loads((folder / name).read_text())

    modules = read("modules.json")
    assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Normalize"]
    assert [one["type"].rpartition(".")[2] for one in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = read("1_Pooling/config.json")
    assert pooling.pop("word_embedding_dimension") == 32
    assert [name for name, on in pooling.items() if on] == [f"pooling_mode_{mode}"]
    assert read("2_Normalize/config.json") == {}
    assert read("sentence_bert_config.json")["max_seq_length"] == 32
    assert read("config_sentence_transformers.json")["similarity_fn_name"] == "cosine"
    # They are a part of the folder, whose hashes are compared.
    assert gives_vectors(load_compressed(folder))


def test_a_folder_that_only_we_can_open_says_nothing(saved):
    assert not (saved(Structured(heads=0.5, start=0.0, end=0.5)) / "modules.json").exists()


def test_a_smaller_model_of_a_plain_shape_opens_there_too(saved):
    folder = saved(Structured(ffn=0.5, uniform=True, start=0.0, end=0.5))
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 32
    assert (folder / "modules.json").is_file()


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_sentence_transformers_gives_the_same_vectors(saved, tokenizer, how):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = saved(pooling=how)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        wanted = load_compressed(folder)(**batch).logits
    got = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.from_numpy(got), wanted, atol=1e-6, rtol=1e-5)
