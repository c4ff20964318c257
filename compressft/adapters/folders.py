"""Read any adapter folder onto a base; save one in PEFT's format where that can hold it, else in our own."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compressft.adapters import our_format, peft_format
from compressft.adapters.adapterhub.names import FUSION_CONFIG
from compressft.adapters.adapterhub.read import read as read_adapterhub
from compressft.adapters.adapterhub.read import read_fusion
from compressft.adapters.card import adapter_card
from compressft.adapters.detect import Kind, detect
from compressft.adapters.files import CONFIG
from compressft.adapters.settled import Settled

DEFAULT = "default"
READERS = {
    "compressft": our_format.read,
    "delta": our_format.read_delta,
    "peft": peft_format.read,
    "adapterhub": read_adapterhub,
    "fusion": read_fusion,
}


def read(base: nn.Module, folder: str | Path) -> Settled:
    """What a saved adapter makes of this base: a tree that shares the base's tensors but what is the adapter's.

    Args:
        base: a plain model of transformers, from `load_model`; it stays as it is.
        folder: a run directory or its `delta/`, or an adapter saved by us, PEFT or the `adapters` package.

    Raises:
        UserError: something is missing, damaged, unknown, of another shape or made on another base.
    """
    kind, where = detect(Path(folder).expanduser())
    return READERS[kind](base, where)


def named(folder: Path) -> dict[str, Path]:
    """Name -> folder of all adapters that `save_pretrained` wrote: "default" in the folder itself, others inside it."""
    if (folder / FUSION_CONFIG).is_file():
        # The adapters inside are its parts.
        return {DEFAULT: folder}
    inside = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    return inside if inside and not (folder / CONFIG).is_file() else {DEFAULT: folder, **inside}


def save(settled: Settled, folder: Path) -> Kind:
    """Write `adapter_config.json`, `adapter_model.safetensors` and a model card; says in whose format."""
    folder.mkdir(parents=True, exist_ok=True)
    kind: Kind = "peft" if peft_format.refusal(settled) is None else "compressft"
    (peft_format if kind == "peft" else our_format).write(settled, folder)
    adapter_card(settled, kind).save(folder / "README.md")
    return kind
