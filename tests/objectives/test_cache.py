"""Kept answers: the same losses, no second question, and nothing wrong after a kill."""

import pytest
import torch
from safetensors.torch import load_file

from compressft.errors import UserError
from compressft.methods.adapter import Adapter
from compressft.objectives.distill import Distill
from compressft.objectives.distillation.cache import AnswerCache
from compressft.objectives.distillation.teacher import Answer
from compressft.transform import Context
from tests.objectives.pair import prepared, terms
from tests.tiny import batch_for, fit, labelled, padded, tiny

FIELDS = {"teacher": "t", "hidden": 1.0, "cosine": 1.0}
KEPT = Distill(**FIELDS, cache=True)
PLAIN = Distill(**FIELDS)


def counted(model):
    """Count the rows of the model's forwards."""
    rows = []
    model.register_forward_hook(lambda m, a, k, o: rows.append(len(k["input_ids"])), with_kwargs=True)
    return rows


def rows_of(batch, index):
    """Some rows of a batch, cut to their longest."""
    some = {name: value[index] for name, value in batch.items()}
    width = int(some["attention_mask"].sum(1).max())
    return {name: value[:, :width] if value.dim() == 2 else value for name, value in some.items()}


def losses(objective, student, context, batches):
    return [{n: v.detach() for n, v in terms(objective, student, one, context).items()} for one in batches]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_second_epoch_asks_nothing_and_loses_nothing(tmp_path, precision):
    student, teacher = tiny(), tiny(seed=1)
    batches = [labelled(4, seed=seed) for seed in (1, 2)]
    want = losses(PLAIN, student, prepared(PLAIN, student, teacher), batches)
    PLAIN.finalize(student)
    objective = KEPT.model_copy(update={"cache_precision": precision})
    context = prepared(objective, student, teacher, folder=tmp_path)
    rows = counted(teacher)
    epochs = [losses(objective, student, context, batches) for _ in range(2)]
    assert rows == [4, 4] and len(list(tmp_path.glob("*/*.safetensors"))) == 2
    for first, second, plain in zip(*epochs, want, strict=True):
        assert set(plain) == {"distill.logits", "distill.hidden", "distill.cosine"}
        for name, value in plain.items():
            # The first epoch too goes by what was kept, so that a resumed one does not differ from it.
            assert torch.equal(first[name], second[name])
            if precision == "fp32":
                assert torch.equal(first[name], value), "the batches repeat, so the bits do"
            else:
                torch.testing.assert_close(first[name], value, atol=1e-4, rtol=1e-3)
    assert load_file(next(tmp_path.glob("*/*.safetensors")))["logits"].dtype == objective_dtype(precision)


def objective_dtype(precision):
    return torch.float16 if precision == "fp16" else torch.float32


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_answers_are_read_inside_autocast(tmp_path, precision):
    """As training does where the processor multiplies bf16: autocast on a CPU refuses to join fp16."""
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    objective = KEPT.model_copy(update={"cache_precision": precision})
    context = prepared(objective, student, teacher, folder=tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = losses(objective, student, context, [batch, batch])
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_other_batches_of_the_same_examples(tmp_path):
    """Shuffled, with other paddings: equal to an uncached loss up to rounding, and still no question."""
    student, teacher, batch = tiny(), tiny(seed=1), labelled(8, length=17)
    context = prepared(KEPT, student, teacher, folder=tmp_path)
    losses(KEPT, student, context, [rows_of(batch, slice(0, 4)), rows_of(batch, slice(4, 8))])
    rows = counted(teacher)
    mixed = [rows_of(batch, torch.tensor(i)) for i in ([7, 0], [2, 5, 6], [4, 3, 1])]
    got = losses(KEPT, student, context, mixed)
    assert rows == []
    KEPT.finalize(student)
    for one, plain in zip(got, losses(PLAIN, student, prepared(PLAIN, student, teacher), mixed), strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(one[name], value, atol=1e-5, rtol=1e-4)


def test_only_new_examples_are_asked_about(tmp_path):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(8)
    context = prepared(KEPT, student, teacher, folder=tmp_path)
    rows = counted(teacher)
    for index in ([0, 1, 2], [1, 2, 3, 3], [0, 3], [4, 4, 4]):
        terms(KEPT, student, {name: value[index] for name, value in batch.items()}, context)
    assert rows == [3, 1, 1]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_logits_per_token(tmp_path, family):
    architecture = "BertForTokenClassification" if family == "bert" else None
    student, teacher = (tiny(family, seed=s, architecture=architecture) for s in (0, 1))
    batch = batch_for(family)
    want = terms(PLAIN, student, batch, prepared(PLAIN, student, teacher))
    PLAIN.finalize(student)
    context = prepared(KEPT, student, teacher, folder=tmp_path)
    for _ in range(2):
        got = terms(KEPT, student, batch, context)
        assert want.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in want.items())


def test_a_resumed_run_goes_on_with_the_same_answers(tmp_path):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(8)
    first = losses(KEPT, student, prepared(KEPT, student, teacher, folder=tmp_path), [batch])
    KEPT.finalize(student)
    rows = counted(teacher)
    other = rows_of(batch, torch.tensor([5, 2]))
    again = losses(KEPT, student, prepared(KEPT, student, teacher, folder=tmp_path), [batch, other])
    assert rows == [] and all(torch.equal(first[0][name], value) for name, value in again[0].items())


@pytest.mark.parametrize("damage", ["truncated", "empty", "staging"])
def test_a_file_that_a_kill_left_behind(tmp_path, damage):
    student, teacher = tiny(), tiny(seed=1)
    batches = [labelled(4, seed=seed) for seed in (1, 2)]
    want = losses(KEPT, student, prepared(KEPT, student, teacher, folder=tmp_path), batches)
    KEPT.finalize(student)
    path = min(tmp_path.glob("*/*.safetensors"))
    raw = path.read_bytes()
    if damage == "staging":
        path.rename(path.with_name(f".{path.name}.77.tmp"))
    else:
        path.write_bytes(raw[: len(raw) // 2] if damage == "truncated" else b"")
    rows = counted(teacher)
    got = losses(KEPT, student, prepared(KEPT, student, teacher, folder=tmp_path), batches)
    assert rows == [4] and got == want
    assert not list(tmp_path.glob("*/.*")) and path.read_bytes() == raw


def test_a_kill_while_writing_leaves_no_answer(tmp_path, monkeypatch):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    context = prepared(KEPT, student, teacher, folder=tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        terms(KEPT, student, batch, context)
    assert not list(tmp_path.glob("*/*.safetensors"))
    monkeypatch.undo()
    rows = counted(teacher)
    terms(KEPT, student, batch, context)
    assert rows == [4]


def test_another_teacher_another_precision_or_other_layers_share_nothing(tmp_path):
    batch = labelled(4)
    for seed, changes in ((1, {}), (2, {}), (1, {"cache_precision": "fp16"}), (1, {"layer_map": "last"})):
        student, teacher = tiny(), tiny(seed=seed)
        objective = KEPT.model_copy(update=changes)
        rows = counted(teacher)
        terms(objective, student, batch, prepared(objective, student, teacher, folder=tmp_path))
        assert rows == [4], changes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student, teacher = tiny(), tiny(seed=1)
        rows = counted(teacher)
        terms(KEPT, student, batch, prepared(KEPT, student, teacher, folder=tmp_path))
        assert rows == [4]
    assert len(list(tmp_path.iterdir())) == 5


def test_ids_and_segments_are_the_key(tmp_path):
    cache = AnswerCache(tmp_path, torch.float32)
    asked = []

    def compute(rows):
        asked.append(len(rows["input_ids"]))
        return Answer(logits=rows["input_ids"].sum(1, keepdim=True).float())

    batch = padded()
    assert cache.answer(batch, compute).logits.shape == (4, 1)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 42)}
    cache.answer(changed, compute)
    assert asked == [4], "what stands at paddings does not matter"
    segments = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    cache.answer(segments, compute)
    segments["token_type_ids"][2, 1] = 1
    cache.answer(segments, compute)
    assert asked == [4, 4, 1]


def test_the_base_can_be_kept(tmp_path):
    """Its answers stay right while adapters train, and its forwards are gone from the second epoch."""
    student, batch = tiny(), labelled(8)
    Adapter(placement="pfeiffer", size=4).prepare(student, Context())
    fields = {"teacher": "base", "logits": 0.0, "hidden": 1.0}
    objective = Distill(**fields, cache=True)
    context = prepared(objective, student, folder=tmp_path)
    rows = counted(student)
    fit(student, [objective], [batch], steps=4, context=context)
    assert rows == [8] * 5
    got = terms(objective, student, batch, context)
    objective.finalize(student)
    plain = Distill(**fields)
    want = terms(plain, student, batch, prepared(plain, student))
    assert want["distill.hidden"] > 1e-4 and torch.equal(got["distill.hidden"], want["distill.hidden"])


def test_two_phases_keep_both_kinds_at_once(tmp_path):
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    objective = KEPT.model_copy(update={"intermediate_until": 0.5})
    context = prepared(objective, student, teacher, folder=tmp_path)
    rows = counted(teacher)
    assert set(terms(objective, student, batch, context)) == {"distill.hidden", "distill.cosine"}
    objective.after_step(student, 0.5)
    assert set(terms(objective, student, batch, context)) == {"distill.logits"}
    assert rows == [4]


def test_values_beyond_fp16_are_refused(tmp_path):
    student, teacher = tiny(), tiny(seed=1)
    with torch.no_grad():
        teacher.classifier.weight.mul_(1e6)
    objective = KEPT.model_copy(update={"cache_precision": "fp16"})
    with pytest.raises(UserError, match=r"cache_precision: logits is beyond the range of fp16; use fp32"):
        terms(objective, student, labelled(4), prepared(objective, student, teacher, folder=tmp_path))


def test_without_a_run_directory_it_keeps_a_temporary_one():
    student, teacher, batch = tiny(), tiny(seed=1), labelled(4)
    context = prepared(KEPT, student, teacher)
    rows = counted(teacher)
    for _ in range(2):
        terms(KEPT, student, batch, context)
    (cache,) = context.opened.values()
    folder = cache.folder
    assert rows == [4] and folder.is_dir()
    context.opened.clear()
    del cache
    assert not folder.exists()
