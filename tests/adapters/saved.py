"""What the tests of adapter folders share: trained adapters on tiny bases, and folders looked into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from compressft import get_model, load_model
from tests.methods.added import shaken
from tests.tiny import TINY, logits, padded

LORA = {"type": "peft", "config": {"peft_type": "LORA", "r": 4, "lora_alpha": 16}}


def batch_of(family: str) -> dict[str, torch.Tensor]:
    """A padded batch with the family's own padding id."""
    batch = padded()
    pad = TINY[family][1].get("pad_token_id", 0)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)}


def loaded(folder: Path, architecture: str = "AutoModelForSequenceClassification", **arguments: Any) -> Any:
    """A model from a folder, in eval mode."""
    return load_model(str(folder), architecture, **arguments).eval()


def moved(adapted: Any) -> Any:
    """The adapters after every tensor they train has been moved far enough to show in the logits."""
    for tree in adapted.trees.values():
        shaken(tree, *(name for name, tensor in tree.named_parameters() if tensor.requires_grad))
    return adapted.eval()


def adapted_on(folder: Path, method: Any, family: str = "bert", name: str = "default", **arguments: Any) -> Any:
    """A method on the model of a folder, its tensors moved."""
    architecture = arguments.pop("architecture", "AutoModelForSequenceClassification")
    return moved(get_model(loaded(folder, architecture, **arguments), method, name).eval())


def config_of(folder: Path) -> dict[str, Any]:
    """adapter_config.json."""
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one, and the hash over all goes, as older folders have none."""
    values = {**json.loads(path.read_text()), "hash": None, **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def same(model: Any, other: Any, family: str = "bert", limit: float = 0.0) -> None:
    """Equal logits, to the bit by default."""
    batch = batch_of(family)
    difference = float((logits(model, batch) - logits(other, batch)).abs().max())
    assert difference <= limit, difference
