"""The models that adapters are compared on: a tiny random one of every shared family, and a real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressft.model.load import load_model
from compressft.model.source import load_tokenizer
from compressft.modules.attention import TRAINING, register

VOCABULARY, LABELS = 97, 3
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "pad_token_id": 1},
    "xlm-roberta": {**_ENCODER, "pad_token_id": 1},
    "electra": {**_ENCODER, "embedding_size": 16},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0},
    "llama": _DECODER,
    "mistral": _DECODER,
}
# The real model, and texts for it.
REAL = "minilm"
TEXTS = (
    "My card still has not arrived.",
    "Why was I charged a fee for taking out money in another country, and how do I get it back?",
    "top up",
    "I would like to know which currencies the account holds, please.",
)


def write_bases(folder: Path) -> list[str]:
    """Write every base with a head for `LABELS` classes and its inputs; their names."""
    for family, fields in FAMILIES.items():
        _write(folder / family, _random(family, fields), _tokens(int(fields.get("pad_token_id", 0))))
    model = load_model(REAL, "AutoModelForSequenceClassification", num_labels=LABELS)
    encoded = load_tokenizer(REAL)(list(TEXTS), padding=True, return_tensors="pt")
    _write(folder / REAL, model, {name: encoded[name] for name in ("input_ids", "attention_mask")})
    return [*FAMILIES, REAL]


def _write(folder: Path, model: Any, inputs: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    save_file(dict(inputs), folder / "inputs.safetensors")


def _random(family: str, fields: Mapping[str, Any]) -> nn.Module:
    import transformers

    register()
    settings = {"vocab_size": VOCABULARY, "num_labels": LABELS, "pad_token_id": 0, **fields}
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=TRAINING)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            one = 1.0 if tensor.dim() == 1 and name.endswith("weight") else 0.0
            tensor.copy_(noise * (0.2 if tensor.dim() > 1 else 0.1) + one)
    return model.eval()


def _tokens(padding: int) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right."""
    ids = torch.randint(5, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9)[None] < torch.tensor([9, 7, 5, 2])[:, None]
    return {"input_ids": ids.masked_fill(~mask, padding), "attention_mask": mask.long()}
