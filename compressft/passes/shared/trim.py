"""Take pieces out of a fast tokenizer so that what remains still spells every text that it spelled before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from compressft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "tokenizer.json"
# The content of that file, or a part of it, whose form is another library's.
Document: TypeAlias = dict[str, Any]


def trim(tokenizer: PreTrainedTokenizerBase, used: Iterable[int]) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """A tokenizer that keeps the pieces with these ids and what its model cannot do without.

    Special and added tokens always stay, and so do all single characters and bytes. WordPiece: the characters in both
    forms (`c` and `##c`), so that greedy matching never gets stuck: no text gets an unknown token that had none. BPE:
    every piece that a kept piece is merged from; the merges of kept pieces keep their order, so that a text whose
    pieces are all kept is cut as before. Unigram: the scores stay; the same holds.

    Args:
        tokenizer: a fast transformers tokenizer.
        used: ids to keep.

    Returns:
        the new tokenizer, and the kept old ids in ascending order: new id i was old id `kept[i]`.

    Raises:
        UserError: no fast tokenizer, an algorithm other than these three, or a WordPiece vocabulary with a character
            that has no piece of its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "pass vocabulary: the model's tokenizer is not a fast one; convert it to a tokenizer.json first"
        )
    document = json.loads(backend.to_str())
    model = document["model"]
    rule = RULES.get(model["type"])
    if rule is None:
        raise UserError(
            f"pass vocabulary: the tokenizer's algorithm is {model['type']}; it can be {', '.join(sorted(RULES))}"
        )
    added = {entry["id"] for entry in document["added_tokens"]}
    pieces = _pieces(model)
    wanted = set(used) | added | {i for token in _named(model) if (i := pieces.get(token)) is not None}
    kept = sorted(rule(model, pieces, wanted))
    new = {old: i for i, old in enumerate(kept)}
    _renumber(document, pieces, new)
    return _reload(tokenizer, document, new), kept


def _pieces(model: Document) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {piece: i for i, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _named(model: Document) -> list[str]:
    """Tokens that the model itself refers to."""
    unknown = model.get("unk_token")
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    return [unknown] if unknown else []


def _word_piece(model: Document, pieces: Mapping[str, int], wanted: set[int]) -> set[int]:
    prefix = model["continuing_subword_prefix"]
    specials = {piece for piece, i in pieces.items() if i in wanted and len(piece) > 1 and piece[0] == "["}
    kept = set(wanted)
    for piece in pieces:
        if piece in specials or piece.startswith("[unused"):
            continue
        forms = [prefix + c for c in piece.removeprefix(prefix)]
        if not piece.startswith(prefix):
            forms[:1] = [piece[0]]
        for form in forms:
            if form not in pieces:
                raise UserError(
                    f"pass vocabulary: the tokenizer has {piece!r} but no piece {form!r}; texts could become unknown"
                )
            kept.add(pieces[form])
    return kept


def _bpe(model: Document, pieces: Mapping[str, int], wanted: set[int]) -> set[int]:
    parents: dict[int, set[int]] = {}
    for left, right in _merges(model):
        whole = pieces.get(left + right)
        if whole is not None:
            parents.setdefault(whole, set()).update((pieces[left], pieces[right]))
    # What no merge yields is an alphabet: characters, bytes, added symbols.
    kept = wanted | {i for i in pieces.values() if i not in parents}
    todo = list(kept)
    while todo:
        for part in parents.get(todo.pop(), ()):
            if part not in kept:
                kept.add(part)
                todo.append(part)
    return kept


def _unigram(model: Document, pieces: Mapping[str, int], wanted: set[int]) -> set[int]:
    # One character, a byte such as <0x0A>, or a word boundary with one character behind it.
    single = {i for piece, i in pieces.items() if len(piece.removeprefix("▁")) <= 1 or _is_byte(piece)}
    return wanted | single


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


RULES: dict[str, Callable[[Document, Mapping[str, int], set[int]], set[int]]] = {
    "WordPiece": _word_piece,
    "BPE": _bpe,
    "Unigram": _unigram,
}


def _merges(model: Document) -> list[tuple[str, str]]:
    """Pairs; older files write them as one string with a blank."""
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]  # type: ignore[misc]


def _renumber(document: Document, pieces: Mapping[str, int], new: Mapping[int, int]) -> None:
    model = document["model"]
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
    else:
        model["vocab"] = {piece: new[i] for piece, i in pieces.items() if i in new}
    if model["type"] == "BPE":
        live = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if a in live and b in live and a + b in live]
    for entry in document["added_tokens"]:
        entry["id"] = new[entry["id"]]
    if document.get("padding"):
        document["padding"]["pad_id"] = new[document["padding"]["pad_id"]]
    if document.get("post_processor"):
        _renumber_processor(document["post_processor"], new)


def _renumber_processor(processor: Document, new: Mapping[int, int]) -> None:
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, new)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], new[processor[name][1]]]


def _reload(tokenizer: PreTrainedTokenizerBase, document: Document, new: Mapping[int, int]) -> PreTrainedTokenizerBase:
    """Through files, as every user of the shipped folder will load it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        root = Path(folder)
        (root / FILE).write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        settings = root / "tokenizer_config.json"
        values = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in values:
            values["added_tokens_decoder"] = {
                str(new[int(i)]): entry for i, entry in values["added_tokens_decoder"].items()
            }
            settings.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        for path in root.iterdir():
            if path.name in ("vocab.txt", "vocab.json", "merges.txt") or path.suffix == ".model":
                # They would say the old vocabulary.
                path.unlink()
        loaded = type(tokenizer).from_pretrained(folder)
    loaded.name_or_path = tokenizer.name_or_path
    assert len(loaded) == len(new)
    return loaded
