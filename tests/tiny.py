"""Tiny random models of every family (hidden 32, two layers, four heads), padded batches and small helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compressft.model.anatomy import anatomy
from compressft.model.surgery import compress_linear
from compressft.modules.attention import TRAINING, register
from compressft.modules.dropout import quicken
from compressft.modules.gate import ColumnGate
from compressft.run.step import loss_terms, total
from compressft.transform import Context, Transform

VOCABULARY = 97
LABELS = 3
_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
# Own head_dim: 4 * 16 is not the hidden size.
_LLAMA: dict[str, Any] = {**_BERT, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": None, "eos_token_id": None}
_LLAMA_8: dict[str, Any] = {name: value for name, value in _LLAMA.items() if name != "head_dim"}
_DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 40,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# family -> (model class, configuration). Most decoders predict tokens, the others classify.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", _BERT),
    "roberta": ("RobertaForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "camembert": ("CamembertForSequenceClassification", {**_BERT, "pad_token_id": 1}),
    "electra": ("ElectraForSequenceClassification", {**_BERT, "embedding_size": 16}),
    "distilbert": ("DistilBertForSequenceClassification", _DISTILBERT),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA_8),
    "qwen3": ("Qwen3ForSequenceClassification", _LLAMA),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
}
# Encoder-decoders, family -> the same; they take decoder inputs besides (`pair_batch`).
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
            "max_position_embeddings": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
    ),
}
# What the configurations above say: (heads, KV heads, head_dim, ffn).
SHAPE = {family: (4, 2, 16, 64) if family in ("llama", "mistral", "qwen3") else (4, 4, 8, 64) for family in TINY}
SHAPE["qwen2"] = (4, 2, 8, 64)


def tiny(family: str = "bert", *, architecture: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random model in fp32 and eval mode; weights large enough that a lost part shows in the logits."""
    register()
    name, values = {**TINY, **PAIRS}[family]
    settings = {"vocab_size": VOCABULARY, "num_labels": LABELS, "pad_token_id": 0, **values, **changes}
    attention = settings.pop("attention", TRAINING)
    config = transformers.AutoConfig.for_model(family, **settings)
    model = getattr(transformers, architecture or name)._from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.copy_(noise * 0.1 + (1.0 if key.endswith("weight") else 0.0))
    if attention == TRAINING:
        # As our loaders give it.
        quicken(model)
    return model.eval()


def padded(rows: int = 4, length: int = 9, seed: int = 1, left: bool = False) -> dict[str, Tensor]:
    """A batch whose rows have different lengths, the first one the full one; int64 ids and mask (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.zeros_like(ids)
    for row in range(rows):
        mask[row, : max(length - 2 * row, 2)] = 1
    if left:
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def batch_for(family: str) -> dict[str, Tensor]:
    """A padded batch in which the family's own pad token stands at the paddings."""
    batch = padded()
    pad = TINY[family][1].get("pad_token_id", 0)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    return batch


def pair_batch() -> dict[str, Tensor]:
    """A padded batch for encoder-decoders: inputs (4, 9) and labels (4, 5)."""
    return {**padded(), "labels": padded(4, 5, seed=2)["input_ids"].clamp(min=3)}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits without a graph; those of padded tokens are left out of per-token logits."""
    with torch.no_grad():
        out = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return out[batch["attention_mask"].bool()] if out.dim() == 3 else out


def gated(model: nn.Module, keep: list[dict[str, Tensor]]) -> None:
    """Put gates that keep these head groups and FFN neurons in front of every o and down projection."""
    for layer, kept in zip(anatomy(model).layers, keep, strict=True):
        family = layer.family
        for path, groups, size, name in (
            (family.o, layer.kv_heads, layer.head_dim * layer.heads // layer.kv_heads, "heads"),
            (family.down, layer.ffn, 1, "ffn"),
        ):
            linear = compress_linear(model, f"{layer.name}.{path}")
            linear.gates["structured"] = ColumnGate(groups, size)
            linear.gates["structured"].keep(kept[name])


def random_keep(model: nn.Module, seed: int = 0) -> list[dict[str, Tensor]]:
    """Another random keep set for every layer, no two of one size."""
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for i, layer in enumerate(anatomy(model).layers):
        heads = torch.randperm(layer.kv_heads, generator=generator)[: 1 + (i + 1) % layer.kv_heads]
        ffn = torch.randperm(layer.ffn, generator=generator)[: 13 + 10 * i]
        keep.append({"heads": heads.sort().values, "ffn": ffn.sort().values})
    return keep


def labelled(rows: int = 16, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """A padded batch for sequence classification: `labels` (rows,), all classes present."""
    return {**padded(rows, length, seed), "labels": torch.arange(rows) % LABELS}


def fit(
    model: nn.Module,
    transforms: Sequence[Transform],
    batches: Sequence[dict[str, Tensor]],
    steps: int,
    learning_rate: float = 1e-2,
    context: Context | None = None,
) -> None:
    """Train on the batches in turn, calling the hooks as the trainer does: before step 1 and after each update."""
    context = context or Context()
    context.transforms = transforms
    torch.manual_seed(0)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    for transform in transforms:
        transform.after_step(model, 0.0)
    for step in range(steps):
        batch = batches[step % len(batches)]
        terms, _ = loss_terms(model, batch, context)
        total(terms).backward()
        optimiser.step()
        for transform in transforms:
            transform.after_step(model, (step + 1) / steps)
        optimiser.zero_grad()
    model.eval()


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Fraction of right labels."""
    return float((logits(model, batch).argmax(-1) == batch["labels"]).float().mean())
