"""The trainer: what it minimises, which parameter has which settings, in which order rows come."""

import math
import weakref
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.objectives.distill import Distill
from compressft.recipe.parts import TrainConfig
from compressft.run.feed import LengthGroupedSampler
from compressft.run.track import Tracking
from compressft.run.trainer import CompressionTrainer, Lesson, training_arguments
from compressft.tasks import make_task
from compressft.transform import Context, Transform
from compressft.utils.precision import autocast_dtype
from tests.tiny import LABELS, VOCABULARY, tiny

NAMES = ["a", "b", "c"][:LABELS]


class Pads:
    """The one thing that collating asks of a tokenizer."""

    pad_token_id = 0


class Watch(Transform):
    """Records gradients and progress; asks for what a test sets."""

    type: str = "watch"
    weight: float = 1.0
    extra: float = 0.0
    rate: float | None = None
    seen: ClassVar[list[Any]] = []

    def task_weight(self, model: nn.Module) -> float:
        return self.weight

    def loss(self, model, batch, outputs, context) -> dict[str, Tensor]:
        return {"watch.extra": self.extra * model.classifier.weight.square().sum()} if self.extra else {}

    def param_groups(self, model, context) -> list[dict[str, Any]]:
        return [] if self.rate is None else [{"params": list(model.classifier.parameters()), "lr": self.rate}]

    def after_step(self, model: nn.Module, progress: float) -> None:
        gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        Watch.seen.append((progress, gradients))


@pytest.fixture(autouse=True)
def forget():
    Watch.seen.clear()


def features(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(rows):
        length = int(torch.randint(3, 12, (), generator=generator))
        ids = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": row % LABELS})
    return made


def trainer(
    tmp_path,
    transforms: Sequence[Transform] = (),
    rows: int = 16,
    callbacks: Sequence[TrainerCallback] = (),
    teachers: Mapping[str, nn.Module] | None = None,
    model: nn.Module | None = None,
    **settings: Any,
) -> CompressionTrainer:
    """A trainer on a tiny BERT without dropout, in fp32 where nothing else is said."""
    config = TrainConfig(**{"precision": "fp32", "save": "no", "max_steps": 1, "batch_size": 16, **settings})
    task = make_task("sequence-classification", Pads(), 16, NAMES)
    if model is None:
        model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    context = Context(tuple(transforms), dict(teachers or {}))
    for transform in transforms:
        transform.prepare(model, context)
    torch.manual_seed(0)
    data = features(rows)
    return CompressionTrainer(model, Lesson(task, config, data, data[:4]), context, tmp_path, callbacks)


def batch_of(t: CompressionTrainer, rows: int = 16) -> dict[str, Tensor]:
    return t.data_collator(t.train_dataset[:rows])


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_adapters_decay_and_norms_and_biases_do_not(placement, family, tmp_path):
    method = Adapter(placement=placement, size=4)
    t = trainer(tmp_path, [method], model=tiny(family), weight_decay=0.1)
    t.create_optimizer()
    decayed = {id(p) for group in t.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    weights = {name for name, p in t.model.named_parameters() if p.requires_grad and p.dim() == 2}
    assert sum("adapter" in name or "parallel" in name for name in weights) == (8 if placement == "houlsby" else 4)
    assert {name for name, p in t.model.named_parameters() if id(p) in decayed} == weights


# Loss.


def test_a_row_without_a_label_is_one_of_classes_alone(tmp_path):
    """-100 stands for no label in classification, and is a number like any other in regression."""
    t = trainer(tmp_path)
    batch = batch_of(t)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert t.compute_loss(t.model.train(), batch).item() == 0.0
    numbers = trainer(tmp_path, model=tiny("bert", num_labels=1))
    batch["labels"] = torch.full((16,), -100.0)
    assert numbers.compute_loss(numbers.model.train(), batch).item() > 5000


def test_loss_is_the_sum_of_its_terms(tmp_path):
    """Task loss times all factors, plus every term, each computed again here."""
    teacher = tiny("bert", seed=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    distill = Distill(type="distill", teacher="t", task=0.3, logits=0.7, hidden=0.5, temperature=2.0)
    watch = Watch(weight=0.5, extra=0.25)
    t = trainer(tmp_path, [distill, watch], teachers={"t": teacher})
    batch = batch_of(t)
    t.model.train()
    loss = t.compute_loss(t.model, batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        student = t.model(**inputs, output_hidden_states=True)
        target = teacher(**inputs, output_hidden_states=True)
    log_p = (student.logits.double() / 2).log_softmax(-1)
    log_q = (target.logits.double() / 2).log_softmax(-1)
    mask = batch["attention_mask"].bool()
    pairs = zip(student.hidden_states, target.hidden_states, strict=True)
    terms = {
        "task": 0.3 * 0.5 * -student.logits.double().log_softmax(-1)[torch.arange(16), batch["labels"]].mean(),
        "distill.logits": 0.7 * 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean(),
        "distill.hidden": 0.5 * torch.stack([(s[mask] - g[mask]).double().square().mean() for s, g in pairs]).mean(),
        "watch.extra": 0.25 * t.model.classifier.weight.detach().double().square().sum(),
    }
    assert loss.item() == pytest.approx(float(sum(terms.values())), rel=1e-5)
    assert t.drain_terms() == {name: pytest.approx(float(value), rel=1e-5) for name, value in terms.items()}
    assert t.drain_terms() == {}


def test_loss_outside_training_is_the_tasks_own(tmp_path):
    t = trainer(tmp_path, [Watch(weight=0.5, extra=3.0)])
    batch = batch_of(t)
    t.model.eval()
    with torch.no_grad():
        assert torch.equal(t.compute_loss(t.model, batch), t.model(**batch).loss)
    assert not t.terms


def test_terms_are_means_over_steps(tmp_path):
    t = trainer(tmp_path)
    t.model.train()
    batches = [t.data_collator(t.train_dataset[i : i + 4]) for i in (0, 4, 8)]
    losses = [t.compute_loss(t.model, batch).item() for batch in batches]
    assert t.drain_terms() == {"task": pytest.approx(sum(losses) / 3, rel=1e-6)}


def test_weights_that_are_none_end_the_run(tmp_path):
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.nan
    t = trainer(tmp_path, model=model, learning_rate=3e-3)
    with pytest.raises(UserError, match=r"train: classifier\.weight holds a NaN or an infinity before the first step"):
        t.train()


def test_a_term_that_is_not_finite_ends_the_run(tmp_path):
    t = trainer(tmp_path, [Watch(extra=1e300)], learning_rate=3e-3)
    match = r"loss \(watch\.extra\) became inf at step 1, all weights being finite; lower .*\(now 0\.003\)"
    with pytest.raises(UserError, match=match) as error:
        t.train()
    assert "\n" not in str(error.value)


# Parameters.


def test_own_groups_are_taken_out_of_the_common_ones(tmp_path):
    t = trainer(tmp_path, [Watch(rate=0.125)], learning_rate=1e-3)
    groups = t.create_optimizer().param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in t.model.parameters()}
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    own = {id(p) for p in t.model.classifier.parameters()}
    assert {i for i, rate in rates.items() if rate == 0.125} == own
    assert {rate for i, rate in rates.items() if i not in own} == {1e-3}


def test_frozen_parameters_do_not_move(tmp_path):
    model = tiny("bert")
    model.bert.embeddings.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer(tmp_path, model=model, warmup=0, max_steps=2, batch_size=8, weight_decay=0.1, learning_rate=1e-2).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("bert.embeddings"), name


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Two batches of 8 give the gradient of one of 16 (no dropout, every row once)."""
    found = []
    for batch_size, accumulation in ((16, 1), (8, 2)):
        Watch.seen.clear()
        distill = Distill(type="distill", teacher="self", task=0.5, logits=0.5, hidden=0.0)
        own = {"batch_size": batch_size, "gradient_accumulation": accumulation, "max_grad_norm": 1e9}
        trainer(tmp_path, [distill, Watch(extra=0.1)], **own).train()
        assert [progress for progress, _ in Watch.seen] == [0.0, 1.0]
        found.append(Watch.seen[-1][1])
    assert found[0].keys() == found[1].keys() and len(found[0]) > 30
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6, msg=name)


def test_progress_goes_from_0_to_1(tmp_path):
    trainer(tmp_path, [Watch()], max_steps=4, batch_size=4).train()
    assert [progress for progress, _ in Watch.seen] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert not Watch.seen[0][1] and all(gradients for _, gradients in Watch.seen[1:])


# Order of rows.


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (7, 4), (64, 8), (1003, 16), (850, 16)])
def test_sampler_is_a_permutation(rows, batch):
    sampler = LengthGroupedSampler([i * 7 % 31 for i in range(rows)], batch, seed=3)
    assert len(sampler) == rows and sorted(sampler) == list(range(rows))


def test_sampler_is_a_pure_function_of_seed_and_epoch():
    lengths = [i * 13 % 47 for i in range(500)]

    def order(seed: int, epoch: int, noise: int = 0) -> list[int]:
        torch.manual_seed(noise)
        sampler = LengthGroupedSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0, noise=9)
    different = {tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(different) == 9


def test_sampler_batches_are_of_similar_length():
    """Far less padding than in shuffled batches, and not sorted through the epoch."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 64, (1600,), generator=generator).tolist()

    def batches(order: list[int]) -> list[list[int]]:
        return [[lengths[i] for i in order[k : k + 16]] for k in range(0, len(order), 16)]

    def padding(order: list[int]) -> int:
        return sum(max(b) * len(b) - sum(b) for b in batches(order))

    order = list(LengthGroupedSampler(lengths, 16, seed=0))
    assert padding(order) < 0.15 * padding(list(range(1600)))
    widths = [max(b) for b in batches(order)]
    assert sum(a > b for a, b in pairwise(widths)) in range(30, 70)


def test_short_batch_comes_last():
    order = list(LengthGroupedSampler([5] * 19, 8, seed=0))
    assert sorted(order) == list(range(19))
    lengths = [9] * 8 + [5] * 8 + [2] * 3
    batches = [order[i : i + 8] for order in [list(LengthGroupedSampler(lengths, 8, seed=1))] for i in (0, 8, 16)]
    assert [len({lengths[i] for i in batch}) for batch in batches] == [1, 1, 1] and len(batches[2]) == 3


def test_epochs_see_every_row_once_in_another_order(tmp_path):
    """Through the real data loader."""
    model = tiny("bert")
    seen: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][:, 0].tolist()) if module.training else None,
        with_kwargs=True,
    )
    t = trainer(tmp_path, model=model, rows=20, max_steps=-1, epochs=2, batch_size=8)
    for position, feature in enumerate(t.train_dataset):
        feature["input_ids"][0] = 5 + position
    t.train()
    epochs = [list(chain(*seen[:3])), list(chain(*seen[3:]))]
    assert len(seen) == 6 and epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [5 + i for i in range(20)]


def test_evaluation_pads_as_little_as_it_can(tmp_path):
    """Longest rows first; every one once, and with the figures of rows in any other order."""
    model, rows = tiny("bert"), features(12, seed=3)
    config = TrainConfig(precision="fp32", save="no", max_steps=1, batch_size=4, eval_batch_size=4)
    task = make_task("sequence-classification", Pads(), 16, NAMES)
    widths, found = [], []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for order in (rows, rows[::-1]):
        found.append(CompressionTrainer(model, Lesson(task, config, rows, order), Context(), tmp_path).evaluate())
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert widths == [lengths[i] for i in (0, 4, 8)] * 2 and lengths[0] > lengths[8]
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"])
    predicted = model(**task.collate(rows)).logits.argmax(-1)
    assert found[0]["eval_accuracy"] == (predicted == task.collate(rows)["labels"]).float().mean().item()


def test_evaluation_of_a_language_model_holds_one_batch_of_logits(tmp_path):
    """Earlier batches' logits are gone when the next one's are computed; the figure is that of all rows at once."""
    model = tiny("llama", architecture="LlamaForCausalLM")
    rows = [{**row, "labels": row["input_ids"]} for row in features(12, seed=3)]
    task = make_task("causal-lm", Pads(), 16)
    config = TrainConfig(precision="fp32", save="no", max_steps=1, batch_size=4, eval_batch_size=2)
    logits, alive = [], []

    def watch(module, args, output):
        alive.append(sum(one() is not None for one in logits))
        logits.append(weakref.ref(output.logits))

    kept, metrics = [], task.metrics
    task.metrics = lambda evidence, labels: kept.append(evidence.shape) or metrics(evidence, labels)
    trainer = CompressionTrainer(model, Lesson(task, config, rows, rows), Context(), tmp_path)
    hook = model.register_forward_hook(watch)
    found = trainer.evaluate()
    hook.remove()
    assert len(alive) == 6 and max(alive) == 0
    assert kept == [(12, 2)]
    batch = task.collate(rows)
    with torch.no_grad():
        scores = model(**batch).logits[:, :-1].double()
    surprise = torch.nn.functional.cross_entropy(scores.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found["eval_perplexity"] == pytest.approx(surprise.exp().item(), rel=1e-5)


def test_free_memory_goes_back_after_the_first_steps_and_before_an_evaluation(tmp_path, monkeypatch):
    calls = []
    t = trainer(tmp_path, max_steps=6, batch_size=16)
    monkeypatch.setattr("compressft.run.trainer.trim", lambda: calls.append(t.state.global_step))
    t.train()
    # One epoch is one step here, and each ends with an evaluation.
    assert calls == [1, 1, 2, 2, 3, 4, 4, 5, 6]


# Precision.


def test_fp16_needs_a_gpu():
    with pytest.raises(UserError, match=r"train\.precision: 'fp16' needs a CUDA device"):
        autocast_dtype("fp16", "cpu")
    assert autocast_dtype("fp32", "cpu") is None and autocast_dtype("bf16", "cpu") is torch.bfloat16


def test_one_process_has_one_device(tmp_path, monkeypatch):
    """On a machine with several GPUs, too; others are for other processes."""

    def four(self):
        self._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four))
    assert training_arguments(TrainConfig(), tmp_path, "cpu", None, Tracking()).n_gpu == 1


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_covers_student_and_teacher(tmp_path, precision, dtype):
    if torch.cuda.is_available():
        pytest.skip("this checks the CPU's autocast")
    models = {"student": tiny("bert"), "teacher": tiny("bert", seed=5)}
    seen: dict[str, set[torch.dtype]] = {name: set() for name in models}
    for name, model in models.items():
        query = model.bert.encoder.layer[0].attention.self.query
        query.register_forward_hook(lambda module, args, out, name=name: seen[name].add(out.dtype))
    distill = Distill(type="distill", teacher="t", hidden=1.0)
    t = trainer(tmp_path, [distill], model=models["student"], teachers={"t": models["teacher"]}, precision=precision)
    t.train()
    assert seen == {"student": {dtype}, "teacher": {dtype}}
    # The weights themselves stay in fp32.
    assert {p.dtype for p in t.model.parameters()} == {torch.float32}


def test_tokens_are_counted_without_padding(tmp_path):
    t = trainer(tmp_path, max_steps=2, batch_size=8)
    t.train()
    assert t.tokens == sum(len(f["input_ids"]) for f in t.train_dataset)
