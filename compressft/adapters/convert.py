"""Turn an adapter folder of one package into another's: ours, PEFT's, AdapterHub's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from compressft.adapters import our_format, peft_format
from compressft.adapters.adapterhub import arrange, head
from compressft.adapters.adapterhub.names import FUSION_CONFIG
from compressft.adapters.adapterhub.write import write as write_adapterhub
from compressft.adapters.detect import Kind, detect
from compressft.adapters.files import CONFIG, TENSORS, new_folder, read_json, read_tensors, refuse_filled
from compressft.adapters.folders import READERS
from compressft.adapters.settled import Settled
from compressft.errors import UserError, nearest
from compressft.model.load import load_model
from compressft.model.saved.delta import base_of
from compressft.model.saved.folders import read_manifest
from compressft.model.source import resolve
from compressft.utils.foreign import load_config

Target = Literal["compressft", "peft", "adapterhub"]
TARGETS: tuple[Target, ...] = ("compressft", "peft", "adapterhub")
REFUSALS = {"peft": peft_format.refusal, "adapterhub": arrange.refusal, "compressft": our_format.refusal}
WRITERS = {"compressft": our_format.write, "peft": peft_format.write, "adapterhub": write_adapterhub}
# PEFT's task -> the class of transformers that has its head.
AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
# The last layer of heads, whose rows are the labels.
OUTPUTS = ("classifier.weight", "score.weight", "out_proj.weight", "qa_outputs.weight")


@dataclass(frozen=True)
class Needs:
    """The model that a folder's adapter stands on.

    Attributes:
        base: its name or folder, "" where the folder does not say.
        architecture: class of transformers.
        arguments: of `from_pretrained`, about the labels.
    """

    base: str
    architecture: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Converted:
    """What was read, what was written, and how it is loaded there."""

    source: Kind
    target: Target
    usage: str


def convert(source: Path, target: Path, to: str | None = None, base: str | None = None) -> Converted:
    """Read an adapter folder and write it for another package.

    Args:
        source: a run directory or its `delta/`, an adapter folder of ours, PEFT's or AdapterHub's, a fusion's folder.
        target: a folder that does not exist yet.
        to: whose format. Default: ours for what is another's; for ours PEFT's where that can hold it, else
            AdapterHub's.
        base: the base model, where `source` does not say it or it is elsewhere now.

    Raises:
        UserError: something cannot be read, or the format cannot hold it; says which part and what it could.
    """
    if to is not None and to not in TARGETS:
        raise UserError(f"--to {to!r}: wants one of {', '.join(TARGETS)}{nearest(to, TARGETS)}")
    kind, folder = detect(source.expanduser())
    # Before the base is loaded.
    refuse_filled(target, "DST")
    needs = _needs(kind, folder)
    name = base or needs.base
    if not name:
        raise UserError(f"--base: {folder} does not say which model it was trained on; give its name or folder")
    settled = READERS[kind](_load(name, needs, folder), folder)
    chosen = to or _choose(kind, settled, folder)
    reason = REFUSALS[chosen](settled)
    if reason is not None:
        raise UserError(
            f"--to {chosen}: {reason}" + ("" if chosen == "compressft" else "; --to compressft can hold it")
        )
    WRITERS[chosen](settled, new_folder(target, "DST"))
    return Converted(kind, chosen, _usage(chosen, settled, target))


def _choose(kind: Kind, settled: Settled, folder: Path) -> Target:
    if kind in ("peft", "adapterhub", "fusion"):
        return "compressft"
    reasons: dict[Target, str | None] = {}
    for name in ("peft", "adapterhub"):
        reasons[name] = REFUSALS[name](settled)
        if reasons[name] is None:
            return name
    raise UserError(f"{folder}: {reasons['peft']}; {reasons['adapterhub']}; --to compressft can hold it")


def _load(name: str, needs: Needs, folder: Path) -> nn.Module:
    try:
        _refuse_family(name, needs.architecture)
        return load_model(name, needs.architecture, new_head=False, **needs.arguments)
    except AttributeError:
        raise UserError(f"{folder}: wants a {needs.architecture}, which this transformers does not have") from None
    except UserError as error:
        if isinstance(error.__cause__, RuntimeError):
            raise UserError(
                f"--base: its head has other shapes than the adapter's; give {name!r} without its head"
            ) from None
        raise UserError(f"--base: {error}") from None


def _refuse_family(name: str, architecture: str) -> None:
    """transformers would load another family's weights as random ones."""
    import transformers

    kind = getattr(transformers, architecture, None)
    wanted = getattr(getattr(kind, "config_class", None), "model_type", None)
    found = load_config(resolve(name), "--base").model_type
    if wanted not in (None, found):
        raise UserError(
            f"{name!r} is a {found!r} model, the adapter was trained on a {wanted!r} ({architecture}); give that one"
        )


def _needs(kind: Kind, folder: Path) -> Needs:
    if kind == "compressft":
        entry = our_format.manifest(folder)
        return Needs(entry["base"], entry["architecture"], _labels(entry["labels"]))
    if kind == "delta":
        entry = read_manifest(folder, "delta")
        return Needs(
            base_of(folder, {"model": "", **entry}), entry["architecture"], _labels(entry["config"].get("id2label"))
        )
    if kind == "peft":
        return _needs_of_peft(folder)
    entry = read_json(folder / (FUSION_CONFIG if kind == "fusion" else CONFIG))
    found, arguments = head.wanted(folder)
    architecture = found or _headless(entry)
    return Needs(entry.get("model_name") or "", architecture, arguments)


def _labels(found: object) -> dict[str, object]:
    if not found or not isinstance(found, dict):
        return {}
    labels = {int(number): label for number, label in found.items()}
    return {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}


def _headless(entry: Mapping[str, object]) -> str:
    """A class for an adapter without head: its own where transformers has it with one, else any with a head."""
    import transformers

    name = str(entry.get("model_class"))
    return name if "For" in name and hasattr(transformers, name) else "AutoModelForSequenceClassification"


def _needs_of_peft(folder: Path) -> Needs:
    entry = read_json(folder / CONFIG)
    task, mapping = entry.get("task_type"), entry.get("auto_mapping") or {}
    architecture = AUTO.get(str(task)) or mapping.get("base_model_class")
    if architecture is None:
        raise UserError(
            f"{folder / CONFIG}: neither task_type nor auto_mapping says the model's class; set task_type to one of "
            f"{', '.join(AUTO)}"
        )
    stored = read_tensors(folder, [TENSORS, peft_format.BINARY])
    rows = next((tensor.shape[0] for name, tensor in stored.items() if name.endswith(OUTPUTS)), None)
    return Needs(entry.get("base_model_name_or_path") or "", architecture, {} if rows is None else {"num_labels": rows})


def _usage(chosen: Target, settled: Settled, target: Path) -> str:
    if chosen == "peft":
        return f"peft.PeftModel.from_pretrained(model, {str(target)!r})"
    if chosen == "compressft":
        return f"compressft.Adapted.from_pretrained(model, {str(target)!r})"
    model = "AutoAdapterModel" if head.fitting(settled.plain) else type(settled.plain).__name__
    if (target / FUSION_CONFIG).is_file():
        first = f"model.load_adapter of each folder in {target} and then "
        return f"{first}model.load_adapter_fusion, with use_safetensors=True (model: {model} of adapters)"
    return f"model.load_adapter({str(target)!r}, use_safetensors=True, set_active=True) (model: {model} of adapters)"
