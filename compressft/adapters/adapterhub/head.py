"""Prediction heads of the `adapters` package: those of transformers' own classes, and its flexible ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from compressft.adapters.adapterhub.names import HEAD, HEAD_BINARY, HEAD_CONFIG
from compressft.adapters.files import read_json, read_tensors, write_json, write_tensors
from compressft.adapters.settled import Settled, of_backbone
from compressft.errors import UserError
from compressft.modules.pretrained import pretrained
from compressft.utils.texts import JSON


@dataclass(frozen=True)
class Flexible:
    """A flexible head that computes what a head of transformers does: its linear layers, the first one first."""

    kind: str
    activation: str | None
    layers: tuple[str, ...]
    pooler: bool = False

    def places(self) -> dict[str, str]:
        """Position in the flexible head -> path of the layer in a model; dropouts and activations count as well."""
        return dict(zip(("1", "4"), self.layers, strict=False))


_TAGGING = Flexible("tagging", None, ("classifier",))
_ROBERTA = Flexible("classification", "tanh", ("classifier.dense", "classifier.out_proj"))
# (family, end of the architecture) -> the heads that fit, the one that is written first.
HEADS: dict[tuple[str, str], tuple[Flexible, ...]] = {
    ("bert", "ForSequenceClassification"): (
        Flexible("classification", "tanh", ("bert.pooler.dense", "classifier")),
        Flexible("classification", None, ("classifier",), pooler=True),
    ),
    ("roberta", "ForSequenceClassification"): (_ROBERTA,),
    ("xlm-roberta", "ForSequenceClassification"): (_ROBERTA,),
    ("electra", "ForSequenceClassification"): (
        Flexible("classification", "gelu", ("classifier.dense", "classifier.out_proj")),
    ),
    ("distilbert", "ForSequenceClassification"): (
        Flexible("classification", "relu", ("pre_classifier", "classifier")),
    ),
    **{
        (family, "ForTokenClassification"): (_TAGGING,)
        for family in ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
    },
}
AUTO = {"classification": "AutoModelForSequenceClassification", "tagging": "AutoModelForTokenClassification"}


def fitting(model: nn.Module) -> tuple[Flexible, ...]:
    """Flexible heads that compute what this model's head does."""
    kind: str = pretrained(model).config.model_type
    return next((rows for (k, end), rows in HEADS.items() if k == kind and type(model).__name__.endswith(end)), ())


def wanted(folder: Path) -> tuple[str | None, dict[str, object]]:
    """(class of transformers that has a folder's head, its arguments); (None, {}) where there is no head.

    Raises:
        UserError: a head that no class here has.
    """
    if not (folder / HEAD_CONFIG).is_file():
        return None, {}
    entry = read_json(folder / HEAD_CONFIG)
    config = entry.get("config")
    if config is None:
        labels = entry.get("label2id") or {}
        return entry.get("model_class"), _labels(labels, entry.get("num_labels"))
    if config.get("head_type") not in AUTO:
        raise UserError(
            f"{folder / HEAD_CONFIG}: config.head_type {config.get('head_type')!r} is not read; {', '.join(AUTO)} are"
        )
    return AUTO[config["head_type"]], _labels(config.get("label2id") or {}, config.get("num_labels"))


def _labels(label2id: Mapping[str, int], number: int | None) -> dict[str, object]:
    if label2id and len(label2id) == (number or len(label2id)):
        return {"label2id": dict(label2id), "id2label": {number: label for label, number in label2id.items()}}
    return {} if number is None else {"num_labels": number}


def read_head(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """A folder's head by the names in this model, {} where it has none.

    Raises:
        UserError: the model's class has another head; a tensor is missing or unknown.
    """
    if not (folder / HEAD_CONFIG).is_file():
        return {}
    entry = read_json(folder / HEAD_CONFIG)
    stored = read_tensors(folder, [HEAD, HEAD_BINARY])
    config, name = entry.get("config"), entry.get("name")
    if config is None:
        if entry.get("model_class") != type(base).__name__:
            raise UserError(
                f"{folder / HEAD_CONFIG}: is the head of a {entry.get('model_class')}, the model here is a "
                f"{type(base).__name__}; load the model as that class"
            )
        return stored
    row = next((row for row in fitting(base) if _same(row, config)), None)
    if row is None:
        asked = {key: config.get(key) for key in ("head_type", "layers", "activation_function", "use_pooler")}
        raise UserError(f"{folder / HEAD_CONFIG}: config {asked} is no head that a {type(base).__name__} can have")
    found = {}
    for place, path in row.places().items():
        for part in ("weight", "bias"):
            key = f"heads.{name}.{place}.{part}"
            if key in stored:
                found[f"{path}.{part}"] = stored.pop(key)
    if stored or not found:
        raise UserError(f"{folder}: tensor {min(stored, default='heads.' + str(name))!r} is no part of the head")
    return found


def _same(row: Flexible, config: Mapping[str, JSON]) -> bool:
    return (
        row.kind == config.get("head_type")
        and len(row.layers) == config.get("layers")
        and (len(row.layers) == 1 or row.activation == config.get("activation_function"))
        and row.pooler == bool(config.get("use_pooler"))
    )


def write_head(settled: Settled, folder: Path, name: str) -> None:
    """Write the head that goes with an adapter or fusion of this name; nothing where the method has none of its own.

    A flexible head where one computes the same, which `adapters.AutoAdapterModel` loads (a pooler is part of it);
    elsewhere that of the model's class, which the class itself loads after `adapters.init`.
    """
    if not settled.head:
        return
    model = pretrained(settled.plain)
    config = model.config
    assert config.id2label is not None
    labels: dict[str, JSON] = {label: number for number, label in config.id2label.items()}
    common = {"hidden_size": config.hidden_size, "model_name": str(getattr(model, "name_or_path", "") or "")}
    common |= {"model_type": config.model_type, "version": "adapters.1.3.0"}
    state = settled.model.state_dict()
    rows = fitting(model)
    if rows:
        row = rows[0]
        parts = {f"heads.{name}.{place}": path for place, path in row.places().items()}
        tensors = {f"{to}.{part}": state[f"{path}.{part}"] for to, path in parts.items() for part in ("weight", "bias")}
        values: dict[str, JSON] = {
            "head_type": row.kind,
            "num_labels": config.num_labels,
            "layers": len(row.layers),
            "activation_function": row.activation,
            "label2id": labels,
        }
        if row.kind == "classification":
            values |= {"use_pooler": row.pooler, "bias": True, "dropout_prob": None}
        # AutoAdapterModel's class for the family.
        family = type(model).__name__.partition("For")[0]
        entry = {**common, "config": values, "model_class": f"{family}AdapterModel", "name": name}
    else:
        tensors = {name: tensor for name, tensor in settled.changed.items() if not of_backbone(model, name)}
        entry = {**common, "config": None, "model_class": type(model).__name__, "name": None}
        entry |= {"num_labels": config.num_labels, "label2id": labels}
    write_tensors(folder / HEAD, tensors)
    write_json(folder / HEAD_CONFIG, entry)
