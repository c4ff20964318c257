"""Words that are already split have the pieces that they have in a text, whatever the tokenizer; empty texts."""

import itertools
import json

import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from compressft.data.rows import ROW_KEY
from compressft.errors import UserError
from compressft.model.source import load_tokenizer
from compressft.tasks import make_task
from compressft.tasks.task import IGNORE
from compressft.tasks.words import wants_blanks, with_blanks

TEXTS = ("Ana lives in New York and works for the city .", "New York is a city ; Ana isn't in it .")
WORDS = ["Ana", "works", "in", "New", "York", ",", "isn't", "it", "?"]
TAGS = ["B-PER", "O", "O", "B-LOC", "I-LOC", "O", "O", "O", "O"]


def trained(pre_tokenizer):
    """A byte-level BPE of a few dozen merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(itertools.repeat(" ".join(TEXTS), 20), trainer)
    return made


def byte_level(prefix=False):
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=prefix))


def cut_first():
    """As Llama 3 and Qwen have it."""
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return trained(pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), after]))


def wrapped(made):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<pad>")


def of_class(kind, made, **changes):
    model = json.loads(made.to_str())["model"]
    return kind(vocab=model["vocab"], merges=list(map(tuple, model["merges"])), pad_token="<pad>", **changes)


KINDS = {
    "generic": lambda: wrapped(byte_level()),
    "generic, prefixed": lambda: wrapped(byte_level(prefix=True)),
    "cut first": lambda: wrapped(cut_first()),
    "gpt2": lambda: of_class(transformers.GPT2Tokenizer, byte_level()),
    "gpt2, prefixed": lambda: of_class(transformers.GPT2Tokenizer, byte_level(), add_prefix_space=True),
    "roberta": lambda: of_class(transformers.RobertaTokenizer, byte_level()),
    "qwen2": lambda: of_class(transformers.Qwen2Tokenizer, cut_first()),
}


def rows(words=WORDS, tags=TAGS):
    return [{"tokens": list(words), "tags": list(tags), ROW_KEY: "f:1"}]


@pytest.mark.parametrize("name", KINDS)
def test_pieces_are_those_of_the_text(name, tmp_path):
    """In training, and of the files that ship, by whoever gives them the plain text."""
    made = KINDS[name]()
    made.save_pretrained(tmp_path)
    (feature,) = make_task("token-classification", made, 64, sorted(set(TAGS))).encode(rows())
    shipped = load_tokenizer(str(tmp_path))
    assert feature["input_ids"] == made(" ".join(WORDS))["input_ids"] == shipped(" ".join(WORDS))["input_ids"]
    assert make_task("token-classification", shipped, 64, sorted(set(TAGS))).encode(rows()) == [feature]
    # As the words in the middle of a text that it was trained on: one piece each, with the blank.
    pieces = made.convert_ids_to_tokens(feature["input_ids"])
    assert {"ĠNew", "ĠYork", "Ġin"} <= set(pieces)
    # The first piece of each word has its tag.
    tags = [sorted(set(TAGS))[i] for i in feature["labels"] if i != IGNORE]
    assert tags == TAGS
    first = pieces.index("ĠNew")
    assert feature["labels"][first] == sorted(set(TAGS)).index("B-LOC")


def test_word_pieces_are_what_they_were(tokenizer):
    (feature,) = make_task("token-classification", tokenizer, 64, sorted(set(TAGS))).encode(rows())
    assert feature["input_ids"] == tokenizer(WORDS, is_split_into_words=True)["input_ids"]


def test_blanks():
    assert with_blanks(["a", "b", "", " c", "\u00a0d", "e f"]) == ["a", " b", "", " c", "\u00a0d", " e f"]
    assert with_blanks([]) == []


def test_what_cannot_be_done_is_said():
    lower = byte_level()
    # A first letter that is none of the text's any more.
    lower.normalizer = normalizers.Prepend("x")
    with pytest.raises(UserError, match="cuts words otherwise than the text that they make; load it with add_prefix"):
        wants_blanks(wrapped(lower))

    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"this tokenizer \(Slow\) does not say whose word a piece is"):
        wants_blanks(Slow())


@pytest.mark.parametrize("name", ["sequence-classification", "regression", "token-classification"])
def test_a_text_without_any_token_is_refused_by_its_place(name):
    """A decoder's tokenizer adds nothing to an empty text: alone it crashes, and padded it means nothing."""
    task = make_task(name, wrapped(byte_level()), 16, ["a"])
    full = {"text": "city", "label": "a", "score": 1.0, "tokens": ["city"], "tags": ["a"]}
    empty = {**full, "text": "", "tokens": [], "tags": []}
    given = [{**row, ROW_KEY: f"rows.jsonl:{i}"} for i, row in enumerate((full, empty, full), 1)]
    with pytest.raises(UserError, match=r"data: rows\.jsonl:2: the text has no token, and this tokenizer adds none"):
        task.encode(given)
    assert len(task.encode(given[::2])) == 2


def test_an_encoder_adds_tokens_to_an_empty_text(tokenizer):
    rows = [{"text": "", "label": "a", ROW_KEY: "f:1"}]
    assert len(make_task("sequence-classification", tokenizer, 16, ["a"]).encode(rows)[0]["input_ids"]) == 2


def test_an_answer_without_any_token_is_refused():
    made = wrapped(byte_level())
    row = {"prompt": "city", "text": "", ROW_KEY: "f:7"}
    # Its end token counts, where there is one.
    assert make_task("causal-lm", made, 16).encode([row])[0]["labels"][-1] == made.eos_token_id
    made.eos_token = None
    with pytest.raises(UserError, match="data: f:7: the text has no token, and this tokenizer has no end token"):
        make_task("causal-lm", made, 16).encode([row])
