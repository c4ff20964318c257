"""Tasks: rows become features and batches; metrics agree with hand counts and with computations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compressft.data.rows import ROW_KEY
from compressft.errors import UserError
from compressft.evaluation.logits import model_logits, model_run, scored
from compressft.evaluation.scores import Scores
from compressft.recipe.program import parse_task
from compressft.tasks import TASKS, make_task
from compressft.tasks.encode import cut
from compressft.tasks.task import IGNORE, Task
from tests.tiny import tiny

# Tasks of one text a row.
ARCHITECTURES = {
    "sequence-classification": ("bert", "BertForSequenceClassification"),
    "regression": ("bert", "BertForSequenceClassification"),
    "token-classification": ("bert", "BertForTokenClassification"),
    "causal-lm": ("llama", "LlamaForCausalLM"),
    "masked-lm": ("bert", "BertForMaskedLM"),
}

TEXTS = ["a short one", "where is the card that I ordered two weeks ago?", "hm"]


def rows_of(**columns):
    names = list(columns)
    return [
        dict(zip(names, values, strict=True)) | {ROW_KEY: f"f:{i}"}
        for i, values in enumerate(zip(*columns.values(), strict=True), 1)
    ]


def example(name, tokenizer) -> tuple[Task, list]:
    """A task with three rows of different lengths."""
    rows = {
        "sequence-classification": rows_of(text=TEXTS, label=["b", "a", "b"]),
        "regression": rows_of(text=TEXTS, score=[0.5, -1.0, 2.0]),
        "token-classification": rows_of(
            tokens=[text.split() for text in TEXTS],
            tags=[["B-X", "O"] * (len(t.split()) // 2) + ["O"] * (len(t.split()) % 2) for t in TEXTS],
        ),
        "causal-lm": rows_of(text=TEXTS),
        "masked-lm": rows_of(text=TEXTS),
    }[name]
    settings = parse_task({"type": name, **({"packed": False} if name == "masked-lm" else {})})
    return make_task(settings, tokenizer, 8 if name == "causal-lm" else 32, TASKS[name].labels_of(rows)), rows


def score(task, logits, labels):
    """Metrics of arrays that are one batch."""
    scores = Scores(task)
    scores.add(torch.from_numpy(np.asarray(logits)), torch.from_numpy(np.asarray(labels)))
    return scores.metrics()


# All tasks.


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batches_pad_to_the_longest_row_and_no_further(tokenizer, name):
    task, rows = example(name, tokenizer)
    features = task.encode(rows)
    batch = task.collate(features)
    width = max(len(f["input_ids"]) for f in features)
    assert len({len(f["input_ids"]) for f in features}) > 1
    for key in ("input_ids", "attention_mask"):
        assert batch[key].dtype == torch.int64
        assert batch[key].shape == (len(features), width)
    for row, feature in enumerate(features):
        length = len(feature["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == feature["input_ids"]
        assert (batch["input_ids"][row, length:] == tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
        if batch["labels"].dim() == 2:
            assert batch["labels"][row, :length].tolist() == feature["labels"]
            assert (batch["labels"][row, length:] == IGNORE).all()
    assert len(batch["labels"]) == len(features)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_score_does_not_depend_on_padding(tokenizer, name):
    task, rows = example(name, tokenizer)
    features = task.encode(rows)
    family, architecture = ARCHITECTURES[name]
    outputs = 1 if name == "regression" else len(task.labels)
    model = tiny(family, architecture=architecture, vocab_size=len(tokenizer), num_labels=outputs)
    alone, together = (model_logits(model, task, features, batch) for batch in (1, 3))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    scores, labels = model_run(model, task)(features), task.truth(features).numpy()
    expected = score(task, scores, labels)
    assert task.metric in expected
    # One batch or several, whose widths differ.
    for batch in (1, 2):
        assert scored(model_run(model, task), task, features, batch) == pytest.approx(expected, rel=1e-5)
    if scores.ndim == 3:
        # Garbage at ignored positions changes nothing.
        padded = np.pad(scores, ((0, 0), (0, 3), (0, 0)), constant_values=1e4)
        wider = np.pad(labels, ((0, 0), (0, 3)), constant_values=IGNORE)
        assert score(task, padded, wider) == pytest.approx(expected)
        scores = np.where((labels == IGNORE)[..., None], 1e4 * np.arange(scores.shape[-1]), scores)
        if name == "token-classification":
            assert score(task, scores, labels) == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_long_rows_are_cut_to_max_length(tokenizer, name):
    words = ["word"] * 50
    rows = {
        "token-classification": rows_of(tokens=[words], tags=[["O"] * 50]),
        "regression": rows_of(text=[" ".join(words)], score=[1.0]),
    }.get(name, rows_of(text=[" ".join(words)], label=["a"]))
    task = make_task(name, tokenizer, 12, TASKS[name].labels_of(rows))
    features = task.encode(rows)
    assert max(len(f["input_ids"]) for f in features) == 12
    assert all(len(f["labels"]) == len(f["input_ids"]) for f in features if isinstance(f["labels"], list))


def test_label_unknown_to_the_model_is_refused_with_its_place(tokenizer):
    for name, rows in (
        ("sequence-classification", rows_of(text=["a", "b"], label=["x", "new"])),
        ("token-classification", rows_of(tokens=[["a"], ["b"]], tags=[["x"], ["new"]])),
    ):
        with pytest.raises(UserError, match=r"f:2: (label|tag) 'new' does not occur in train"):
            make_task(name, tokenizer, 8, ("x",)).encode(rows)


# Sequence classification.


def test_labels_are_sorted_names_and_the_model_gets_them(tokenizer):
    task, rows = example("sequence-classification", tokenizer)
    assert task.labels == ("a", "b")
    assert [f["labels"] for f in task.encode(rows)] == [1, 0, 1]
    assert task.collate(task.encode(rows))["labels"].dtype == torch.int64
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    assert task.model_arguments() == {"pad_token_id": tokenizer.pad_token_id, "num_labels": 2, **names}


def test_text_is_tokenised_as_bert_wants_it(tokenizer):
    task, rows = example("sequence-classification", tokenizer)
    for feature, row in zip(task.encode(rows), rows, strict=True):
        pieces = tokenizer.convert_ids_to_tokens(feature["input_ids"])
        assert (pieces[0], pieces[-1]) == ("[CLS]", "[SEP]")
        assert "".join(p.removeprefix("##") for p in pieces[1:-1]) == row["text"].lower().replace(" ", "")
        assert feature["token_type_ids"] == [0] * len(pieces)


def test_pairs_carry_segments(tokenizer):
    rows = rows_of(text=TEXTS, text_b=["yes", "no no", "a much longer second text than the first"], label=list("aba"))
    task = make_task("sequence-classification", tokenizer, 32, ("a", "b"))
    features = task.encode(rows)
    for feature, row in zip(features, rows, strict=True):
        first = len(tokenizer.tokenize(row["text"])) + 2
        second = len(tokenizer.tokenize(row["text_b"])) + 1
        assert feature["token_type_ids"] == [0] * first + [1] * second
        assert feature["input_ids"][first - 1] == feature["input_ids"][-1] == tokenizer.sep_token_id
    batch = task.collate(features)
    assert (batch["token_type_ids"][batch["attention_mask"] == 0] == 0).all()


def test_accuracy_and_macro_f1_are_hand_counts(tokenizer):
    task = make_task("sequence-classification", tokenizer, 8, ("a", "b", "c"))
    predicted, labels = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 1, 1, 1, 2, 2])
    scores = score(task, np.eye(3)[predicted], labels)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    # a: 1 of 3 guesses, 1 of 1 rows; b: 2 of 2, 2 of 3; c: 1 of 1, 1 of 2.
    f1 = [2 * p * r / (p + r) for p, r in ((1 / 3, 1), (1, 2 / 3), (1, 1 / 2))]
    assert scores["f1_macro"] == pytest.approx(sum(f1) / 3)
    np.testing.assert_array_equal(task.predictions(torch.from_numpy(np.eye(3)[predicted])), predicted)


# Regression.


def test_regression_labels_are_numbers(tokenizer):
    task, rows = example("regression", tokenizer)
    batch = task.collate(task.encode(rows))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, -1.0, 2.0]
    wanted = {"pad_token_id": tokenizer.pad_token_id, "num_labels": 1, "problem_type": "regression"}
    assert task.model_arguments() == wanted


def test_pearson_is_the_covariance_over_the_deviations(tokenizer):
    task, _ = example("regression", tokenizer)
    generator = np.random.default_rng(0)
    labels = generator.normal(size=50).astype(np.float32)
    logits = (0.7 * labels + generator.normal(size=50) + 100).astype(np.float32)[:, None]
    x, y = logits[:, 0].astype(float), labels.astype(float)
    pearson = ((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std())
    scores = score(task, logits, labels)
    assert 0.2 < pearson < 0.9
    assert scores["pearson"] == pytest.approx(pearson, abs=1e-6)
    # Spearman is Pearson on ranks, and blind to monotone maps.
    ranks = [a.argsort().argsort() for a in (x, y)]
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert score(task, np.exp(logits - 100), labels)["spearman"] == pytest.approx(scores["spearman"])
    assert score(task, -logits, labels)["pearson"] == pytest.approx(-pearson, abs=1e-6)


def test_constant_predictions_score_nothing(tokenizer):
    task, _ = example("regression", tokenizer)
    for logits, labels in (([[1.0], [1.0]], [0.0, 1.0]), ([[0.0], [1.0]], [2.0, 2.0]), ([[0.0]], [1.0])):
        assert score(task, np.array(logits), np.array(labels)) == {"pearson": 0.0, "spearman": 0.0}


# Token classification.


def test_the_first_piece_of_a_word_carries_its_tag(tokenizer):
    words = ["Unbelievably", "good", "pneumonia"]
    rows = rows_of(tokens=[words], tags=[["B-X", "O", "I-X"]])
    task = make_task("token-classification", tokenizer, 32, TASKS["token-classification"].labels_of(rows))
    assert task.labels == ("B-X", "I-X", "O")
    (feature,) = task.encode(rows)
    expected = [IGNORE]
    for word, tag in zip(words, ("B-X", "O", "I-X"), strict=True):
        expected += [task.label_ids[tag]] + [IGNORE] * (len(tokenizer.tokenize(word)) - 1)
    assert feature["labels"] == [*expected, IGNORE]
    assert feature["labels"].count(IGNORE) > 2


def test_truncation_keeps_the_tags_of_the_words_that_remain(tokenizer):
    tags = [f"T{i}" for i in range(20)]
    rows = rows_of(tokens=[["cat"] * 20], tags=[tags])
    task = make_task("token-classification", tokenizer, 7, tuple(sorted(tags)))
    (feature,) = task.encode(rows)
    assert [task.labels[i] for i in feature["labels"] if i != IGNORE] == tags[:5]


def test_another_number_of_tags_than_tokens_is_refused(tokenizer):
    task = make_task("token-classification", tokenizer, 8, ("O",))
    with pytest.raises(UserError, match="f:2: 2 tags for 1 tokens"):
        task.encode(rows_of(tokens=[["a"], ["b"]], tags=[["O"], ["O", "O"]]))


def token_score(tokenizer, names, truth, guess):
    """Score of tag sequences, padded, with an ignored position in front of every row."""
    task = make_task("token-classification", tokenizer, 32, names)
    width = max(map(len, truth)) + 2
    labels = np.full((len(truth), width), IGNORE)
    logits = np.zeros((len(truth), width, len(names)))
    for row, (right, said) in enumerate(zip(truth, guess, strict=True)):
        for column, (a, b) in enumerate(zip(right, said, strict=True), 1):
            labels[row, column] = names.index(a)
            logits[row, column, names.index(b)] = 1.0
    return score(task, logits, labels)


def test_span_f1_counts_whole_spans(tokenizer):
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "B-LOC", "O"]]
    guess = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC", "B-PER"]]
    scores = token_score(tokenizer, ("B-LOC", "B-PER", "I-PER", "O"), truth, guess)
    # 4 true spans, 5 guessed, 3 right: the first person is cut short, the last one is none.
    assert scores["f1"] == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert scores["accuracy"] == pytest.approx(5 / 7)


def test_plain_tags_score_accuracy(tokenizer):
    truth, guess = [["NOUN", "VERB"], ["DET", "NOUN", "VERB"]], [["NOUN", "NOUN"], ["DET", "NOUN", "DET"]]
    assert token_score(tokenizer, ("DET", "NOUN", "VERB"), truth, guess) == {"f1": 0.6, "accuracy": 0.6}


# Causal language modelling.


def test_text_is_packed_into_full_blocks(tokenizer):
    rows = rows_of(text=["one two three four five", "six seven", "eight nine ten"])
    features = make_task("causal-lm", tokenizer, 4).encode(rows)
    assert [len(f["input_ids"]) for f in features] == [4, 4, 2]
    assert [i for f in features for i in f["input_ids"]] == tokenizer(
        " ".join(row["text"] for row in rows), add_special_tokens=False
    )["input_ids"]
    assert all(f["labels"] == f["input_ids"] and f["attention_mask"] == [1] * len(f["input_ids"]) for f in features)


def with_end(tokenizer):
    class WithEnd:
        pad_token_id = 0
        eos_token_id = 102

        def __call__(self, *arguments, **keywords):
            return tokenizer(*arguments, **keywords)

    return WithEnd()


def test_texts_end_with_the_end_token_where_there_is_one(tokenizer):
    features = make_task("causal-lm", with_end(tokenizer), 64).encode(rows_of(text=["one two", "three"]))
    pieces = tokenizer.convert_ids_to_tokens(features[0]["input_ids"])
    assert pieces == ["one", "two", "[SEP]", "three", "[SEP]"]


def test_after_a_prompt_only_the_text_and_its_end_count(tokenizer):
    task = make_task("causal-lm", with_end(tokenizer), 7)
    rows = rows_of(prompt=["one two", "one"], text=["three", "one two three four five six"])
    first, second = task.encode(rows)
    assert tokenizer.convert_ids_to_tokens(first["input_ids"]) == ["one", "two", "[SEP]", "three", "[SEP]"]
    assert first["labels"] == [IGNORE] * 3 + first["input_ids"][3:]
    assert len(second["input_ids"]) == len(second["labels"]) == len(second["attention_mask"]) == 7
    assert second["labels"] == [IGNORE] * 2 + second["input_ids"][2:]
    with pytest.raises(UserError, match=r"f:1: a prompt of 3 tokens; .* data\.max_length 3"):
        make_task("causal-lm", with_end(tokenizer), 3).encode(rows)


def test_a_block_of_one_token_predicts_nothing_and_is_dropped(tokenizer):
    task = make_task("causal-lm", tokenizer, 4)
    assert len(task.encode(rows_of(text=["one two three four five"]))) == 1
    with pytest.raises(UserError, match="fewer than two tokens"):
        task.encode(rows_of(text=["one"]))


def test_perplexity_is_the_exponential_of_the_mean_surprise(tokenizer):
    task = make_task("causal-lm", tokenizer, 8)
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(3, 7, 11)) * 2, generator.integers(0, 11, (3, 7))
    labels[1, 5:] = IGNORE
    labels[2, 2:] = IGNORE
    surprise = []
    for row in range(3):
        for position in range(6):
            target = labels[row, position + 1]
            if target != IGNORE:
                scores = logits[row, position]
                surprise.append(math.log(sum(math.exp(s) for s in scores)) - scores[target])
    assert len(surprise) == 6 + 4 + 1
    expected = math.exp(sum(surprise) / len(surprise))
    assert score(task, logits, labels) == {"perplexity": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("vocabulary", [2, 97])
def test_uniform_logits_have_the_vocabulary_as_perplexity(tokenizer, vocabulary):
    task = make_task("causal-lm", tokenizer, 8)
    labels = np.random.default_rng(1).integers(0, vocabulary, (2, 6))
    assert score(task, np.full((2, 6, vocabulary), 3.0), labels)["perplexity"] == pytest.approx(vocabulary, rel=1e-5)


def test_perplexity_agrees_with_the_models_own_loss(tokenizer):
    task, rows = example("causal-lm", tokenizer)
    features = [f for f in task.encode(rows) if len(f["input_ids"]) == 8]
    model = tiny("llama", architecture="LlamaForCausalLM", vocab_size=len(tokenizer))
    with torch.no_grad():
        loss = float(model(**task.collate(features)).loss)
    scores = scored(model_run(model, task), task, features)
    assert scores["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert not task.greater_is_better


def test_rows_that_are_cut_are_counted(tokenizer):
    rows = [{"text": "apple " * n, "label": "a", ROW_KEY: str(n)} for n in (2, 6, 7, 40)]
    task = make_task("sequence-classification", tokenizer, 8, ["a"])
    assert [len(feature["input_ids"]) for feature in task.encode(rows)] == [4, 8, 8, 8]
    assert cut([rows], task) == "2 of 4 rows (50.0%) are longer than data.max_length 8 and are cut"
    assert cut([rows[:2]], task) is None and cut([[]], task) is None
    running = make_task("causal-lm", tokenizer, 8, [])
    assert cut([[{"text": "apple " * 40, ROW_KEY: "x"}]], running) is None
    answered = [{"prompt": "river", "text": "apple " * 40, ROW_KEY: "x"}]
    assert cut([answered], running).startswith("1 of 1 rows (100.0%)")


def test_entities_behind_the_cut_are_counted(tokenizer):
    tags = ["B-X", "O", "O", "B-X", "O", "B-X", "I-X", "B-X"]
    rows = [
        {"tokens": ["apple"] * len(tags), "tags": tags, ROW_KEY: "1"},
        {"tokens": ["a"], "tags": ["B-X"], ROW_KEY: "2"},
    ]
    # [CLS], six words, [SEP]: the third entity is cut in two, the fourth is gone.
    task = make_task("token-classification", tokenizer, 8, ["B-X", "I-X", "O"])
    assert cut([rows], task).endswith("and are cut; 2 of 5 entities end behind the cut, where no metric counts them")
    plain = make_task("token-classification", tokenizer, 8, ["NN", "VB"])
    words = [{"tokens": ["apple"] * 9, "tags": ["NN", "VB", "NN"] * 3, ROW_KEY: "1"}]
    assert cut([words], plain).endswith("; 3 of 9 tags end behind the cut, where no metric counts them")
    assert cut([[{"tokens": ["apple"], "tags": ["NN"], ROW_KEY: "1"}]], plain) is None


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_metrics_of_batches_are_those_of_all_rows(tokenizer, name):
    """Bit for bit, in any cut: sums are kept in float64, and everything else is counted."""
    task, _ = example(name, tokenizer)
    generator = np.random.default_rng(5)
    pieces = {"regression": 1, "causal-lm": 50, "masked-lm": 50}.get(name, len(task.labels))
    rows, width = 24, 7
    tokens = name in ("token-classification", "causal-lm", "masked-lm")
    logits = generator.normal(size=(rows, width, pieces) if tokens else (rows, pieces)).astype(np.float32)
    labels = generator.integers(0, pieces, logits.shape[:-1])
    if name == "regression":
        labels = generator.normal(size=rows).astype(np.float32)
    if tokens:
        labels[::3, 4:] = IGNORE
    expected = score(task, logits, labels)
    for cuts in ([1, 2, 3, 9], [12], range(1, rows)):
        scores = Scores(task)
        for a, b in zip(np.split(logits, cuts), np.split(labels, cuts), strict=True):
            scores.add(torch.from_numpy(a), torch.from_numpy(b))
        assert scores.metrics() == expected


def test_a_vocabulary_leaves_two_numbers_a_row(tokenizer):
    """What an evaluation keeps does not grow with vocabulary or length."""
    task = make_task("causal-lm", tokenizer, 8)
    found = task.evidence(torch.zeros(3, 7, 1000), torch.ones(3, 7, dtype=torch.long))
    assert found.dtype == torch.float64
    assert found.tolist() == [[pytest.approx(6 * math.log(1000)), 6]] * 3
