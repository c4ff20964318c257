"""What sentence-transformers reads next to an embedding model, so that its folder opens there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.model.embedder import POOLING, embedding_class, gives_vectors

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
# Our ways to pool, as its configuration says them.
MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def opens_elsewhere(model: nn.Module, config: PretrainedConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a folder is an embedding model that transformers' own classes build from its configuration alone.

    Args:
        config: as it is written.
        tensors: all that the model is made of, by name; what only we know counts too.
    """
    if not gives_vectors(model):
        return False
    with torch.device("meta"):
        plain = embedding_class(type(config))._from_config(config)
    return {name: one.shape for name, one in plain.state_dict().items()} == {n: t.shape for n, t in tensors.items()}


def write_modules(folder: Path, config: PretrainedConfig, width: int, longest: object) -> None:
    """Write `modules.json`, the pooling and the normalising module, and the two configurations of the whole.

    Args:
        width: of a vector.
        longest: tokens to which a text is cut; None where nobody has said.
    """
    kinds = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(MODULES)
    ]
    how = getattr(config, POOLING)
    pooling = {"word_embedding_dimension": width, **{mode: name == how for name, mode in MODES.items()}}
    whole = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    for path, _ in MODULES[1:]:
        (folder / path).mkdir()
    # An empty folder is not kept by every store.
    files: dict[str, object] = {
        "modules.json": kinds,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "sentence_bert_config.json": {"max_seq_length": longest, "do_lower_case": False},
        "config_sentence_transformers.json": whole,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
