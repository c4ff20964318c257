"""Vocabulary pruning: the same texts, fewer rows; tokenizer files, embedding, tied head and teacher agree."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compressft.errors import UserError
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.shrink import keep_vocabulary
from compressft.model.source import load_tokenizer
from compressft.passes.shared.trim import trim
from compressft.passes.vocabulary import Vocabulary
from compressft.transform import Context, TrainingData
from tests.tiny import TINY, tiny

TEXTS = ["the river was cold in winter", "a garden of paper lamps", "stone, cloud and river!", "who left the lamp on?"]
OTHER = ["gardening in cloudy winters", "the unfathomable riverstones", "lamplit 1234 papers & <stones>", "naïve café"]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def corpus():
    generator = random.Random(0)
    words = " ".join([*TEXTS, *OTHER]).split()
    return [" ".join(generator.choices(words, k=12)) for _ in range(300)]


def trained(kind):
    """A small tokenizer of each algorithm, trained here."""
    if kind == "wordpiece":
        return load_tokenizer("minilm")
    if kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=420, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    else:
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>")
    backend.train_from_iterator(corpus(), trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def ids_of(tokenizer, texts):
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def cut(request):
    old = trained(request.param)
    new, kept = trim(old, {i for ids in ids_of(old, TEXTS) for i in ids})
    return old, new, kept


def test_kept_texts_are_cut_as_before(cut):
    old, new, kept = cut
    assert len(new) == len(kept) < len(old) and kept == sorted(set(kept))
    assert [[kept[i] for i in ids] for ids in ids_of(new, TEXTS)] == ids_of(old, TEXTS)
    assert [old.convert_ids_to_tokens(i) for i in kept] == new.convert_ids_to_tokens(range(len(kept)))


def test_no_text_becomes_unknown(cut):
    old, new, _ = cut
    longer = 0
    for text in [*OTHER, *corpus()[:50]]:
        before, after = old(text)["input_ids"], new(text)["input_ids"]
        if old.unk_token_id not in before:
            assert new.unk_token_id not in after
            assert new.decode(after, skip_special_tokens=True) == old.decode(before, skip_special_tokens=True)
        longer += len(after) > len(before)
    assert longer, "no piece that these texts use is gone: the comparison proves nothing"


def test_special_tokens_and_files_round_trip(cut, tmp_path):
    old, new, kept = cut
    for name in ("pad", "unk", "bos", "eos", "cls", "sep", "mask"):
        before = getattr(old, f"{name}_token_id")
        assert before is None or kept[getattr(new, f"{name}_token_id")] == before
    new.save_pretrained(tmp_path)
    again = type(new).from_pretrained(tmp_path)
    assert ids_of(again, OTHER) == ids_of(new, OTHER) and len(again) == len(kept)
    assert again(TEXTS, padding=True)["input_ids"] == new(TEXTS, padding=True)["input_ids"]


def test_refuses_what_it_cannot_cut():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>")))
    with pytest.raises(UserError, match="algorithm is WordLevel; it can be BPE, Unigram, WordPiece"):
        trim(words, [0])
    vocabulary = {"[UNK]": 0, "a": 1, "ab": 2}
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")))
    with pytest.raises(UserError, match="has 'ab' but no piece '##b'"):
        trim(gap, [2])


@pytest.mark.parametrize("family", TINY)
def test_the_rows_that_stay_compute_the_same(family):
    model, whole = tiny(family), tiny(family)
    rows = torch.tensor([0, 1, 2, 3, 7, 11, 30, 31, 50, 96])
    keep_vocabulary(model, rows)
    assert model.config.vocab_size == len(rows) == model.get_input_embeddings().num_embeddings
    new = torch.tensor([[4, 5, 9, 2], [6, 7, 8, 1]])
    with torch.no_grad():
        got, want = model(new).logits, whole(rows[new]).logits
    if want.shape[-1] == 97:
        assert got.shape[-1] == len(rows)
        want = want[..., rows]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_tied_head_stays_tied():
    model = tiny("gpt2")
    keep_vocabulary(model, torch.arange(0, 97, 2))
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.weight.shape == (49, 32)
    assert model.config.eos_token_id == 0
    keep_vocabulary(model, torch.arange(1, 49))
    assert model.config.eos_token_id is None


def test_roberta_keeps_its_padding_id():
    model = tiny("roberta")
    with pytest.raises(UserError, match="padding id 1, which must stay"):
        keep_vocabulary(model, torch.arange(1, 20))


class Rows:
    """A stage's rows without a stage."""

    def __init__(self, tokenizer, texts):
        self.texts = texts
        self.data = TrainingData(tokenizer, self.encode(tokenizer), None, self.encode)

    def encode(self, tokenizer):
        return [dict(tokenizer(text)) for text in self.texts]


def test_model_teacher_and_rows_follow(tmp_path):
    tokenizer = load_tokenizer("minilm")
    rows = Rows(tokenizer, TEXTS)
    old = rows.data.features
    model, teacher = (tiny(vocab_size=len(tokenizer), seed=s) for s in (0, 1))
    context = Context(load_teacher=lambda name: teacher, data=rows.data)
    want = [m(torch.tensor([old[0]["input_ids"]])).logits for m in (model, teacher)]
    Vocabulary(reserve=("unfathomable",)).prepare(model, context)
    new, ids = rows.data.tokenizer, torch.tensor([rows.data.features[0]["input_ids"]])
    assert len(new) == model.config.vocab_size < 2200
    assert new.tokenize("unfathomable") == tokenizer.tokenize("unfathomable")
    for one, logits in zip((model, context.teacher("t")), want, strict=True):
        assert torch.equal(one(ids).logits, logits)
    save_compressed(model.eval(), new, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(loaded(ids).logits, want[0])
    assert load_tokenizer(str(tmp_path / "model"))(TEXTS[0])["input_ids"] == rows.data.features[0]["input_ids"]


def test_limits_and_reserve(tmp_path):
    tokenizer = load_tokenizer("minilm")

    def kept(**fields):
        rows = Rows(tokenizer, [*TEXTS, *TEXTS[:1]])
        Vocabulary(**fields).prepare(tiny(vocab_size=len(tokenizer)), Context(data=rows.data))
        return set(rows.data.tokenizer.get_vocab())

    everything = kept()
    assert {"river", "garden"} <= everything
    frequent = kept(min_count=2)
    assert "winter" in frequent and "garden" not in frequent and frequent < everything
    few = kept(limit=1)
    assert len(few & {"river", "the", "lamp", "winter", "garden", "cold"}) == 1
    path = tmp_path / "reserve.txt"
    path.write_text("volcano\n\nembassy\n", encoding="utf-8")
    assert {"volcano", "embassy"} <= kept(reserve_file=str(path)) - everything
    with pytest.raises(UserError, match=r"reserve_file: .* does not exist"):
        kept(reserve_file=str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="needs training rows"):
        Vocabulary().prepare(tiny(), Context())


def test_a_teacher_of_another_vocabulary_is_refused():
    rows = Rows(load_tokenizer("minilm"), TEXTS)
    context = Context(load_teacher=lambda name: tiny(vocab_size=500), data=rows.data)
    Vocabulary().prepare(tiny(vocab_size=30522), context)
    with pytest.raises(UserError, match="the teacher has 500 rows, the student 30522 before"):
        context.teacher("t")
