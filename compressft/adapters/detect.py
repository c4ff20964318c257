"""Tell what a folder holds by its files: the same `adapter_config.json` is three things."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compressft.adapters.adapterhub.names import FUSION_CONFIG
from compressft.adapters.files import CONFIG, KEY, read_json
from compressft.errors import UserError
from compressft.model.saved.folders import MANIFEST, read_manifest

Kind = Literal["compressft", "delta", "peft", "adapterhub", "fusion"]


def detect(folder: Path) -> tuple[Kind, Path]:
    """What a folder is, and the folder itself: of a run directory its `delta/`.

    Raises:
        UserError: nothing that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give a run directory, its delta/, or a saved adapter")
    if (folder / "recipe.yaml").is_file():
        folder = folder / "delta"
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: is missing; the run has not finished (compressft run ... --resume)")
    if (folder / MANIFEST).is_file():
        kind = read_manifest(folder).get("kind")
        if kind != "delta":
            raise UserError(f"{folder}: is a {kind!r} folder of ours, no adapter; give the run directory or its delta/")
        return "delta", folder
    if (folder / FUSION_CONFIG).is_file():
        return "fusion", folder
    entry = read_json(folder / CONFIG)
    if KEY in entry:
        return "compressft", folder
    if "peft_type" in entry:
        return "peft", folder
    if "config" in entry:
        return "adapterhub", folder
    raise UserError(
        f"{folder / CONFIG}: has neither {KEY!r} (ours), 'peft_type' (PEFT) nor 'config' (AdapterHub); "
        "give a saved adapter"
    )
