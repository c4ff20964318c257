"""The other side, run in an environment of its own: adapters of the `adapters` package, saved and computed by it.

`peer.py make BASES OUT` makes every case on every model in BASES: OUT/BASE/CASE/ and OUT/BASE.safetensors with logits;
`peer.py load BASES IN OUT` loads every folder IN/BASE/CASE and writes OUT/BASE.safetensors. A base's folder also holds
its inputs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import composition
from safetensors.torch import load_file, save_file

# Case -> (configuration, its changes). The first Houlsby is the paper's, the second the package's own.
POST_NORM: dict[str, tuple[str, dict[str, Any]]] = {
    "houlsby": ("double_seq_bn", {"non_linearity": "gelu_new", "reduction_factor": 8}),
    "houlsby_swish": ("double_seq_bn", {}),
    "pfeiffer": ("seq_bn", {}),
    "pfeiffer_odd": ("seq_bn", {"reduction_factor": 5.3}),
    "pfeiffer_inv": ("seq_bn_inv", {"non_linearity": "gelu"}),
    "parallel": ("par_bn", {}),
    "prefix": ("prefix_tuning", {"prefix_length": 7, "bottleneck_size": 12}),
    "prefix_flat": ("prefix_tuning", {"prefix_length": 5, "flat": True}),
}
PRE_NORM = {
    "houlsby": POST_NORM["houlsby"],
    "pfeiffer": ("double_seq_bn", {"mh_adapter": False, "non_linearity": "relu"}),
    **{case: POST_NORM[case] for case in ("houlsby_swish", "prefix", "prefix_flat")},
}
DECODERS = ("gpt2", "llama", "mistral")
FUSED = ("pfeiffer", "pfeiffer_odd")
# Encoders' cases whose folder holds a head of transformers' own class; the others have a flexible one.
STATIC = ("parallel", "prefix")
LABELS = 3
# Next to SDPA's masks the package hides a decoder's prefix and adds 1 to the scores of DistilBERT's.
ATTENTION = "eager"


def model_of(base: Path, static: bool, name: str = "") -> Any:
    """A new model on the base with a head of either kind; a flexible one where it is named."""
    torch.manual_seed(7)
    if static:
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(base, num_labels=LABELS, attn_implementation=ATTENTION)
        adapters.init(model)
        return model.eval()
    model = adapters.AutoAdapterModel.from_pretrained(base, attn_implementation=ATTENTION)
    if name:
        model.add_classification_head(name, num_labels=LABELS, **heads(model.config.model_type))
    return model.eval()


def heads(kind: str) -> dict[str, str]:
    """What the flexible head of a family needs to be that of its own class."""
    return {"electra": {"activation_function": "gelu"}, "distilbert": {"activation_function": "relu"}}.get(kind, {})


def shaken(model: Any, parts: tuple[str, ...]) -> None:
    """Give every tensor with one of these in its name values that show in the logits."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in parts):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


def added(model: Any, case: str, cases: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """Add a case's adapter under its own name."""
    kind, changes = cases[case]
    model.add_adapter(case, config=adapters.AdapterConfig.load(kind, **changes))


def logits(model: Any, base: Path) -> torch.Tensor:
    """On the base's inputs."""
    with torch.no_grad():
        return model.eval()(**load_file(base / "inputs.safetensors")).logits


def make(base: Path, out: Path) -> dict[str, torch.Tensor]:
    """Every case: a folder and logits."""
    found: dict[str, torch.Tensor] = {}
    decoder = json.loads((base / "config.json").read_text())["model_type"] in DECODERS
    cases = PRE_NORM if decoder else POST_NORM
    for case in cases:
        model = model_of(base, decoder or case in STATIC, case)
        added(model, case, cases)
        shaken(model, (f".{case}.", f".{case}", "classifier.", "score."))
        model.set_active_adapters(case)
        # What is shared between layers, as a prefix is, the package can only pickle.
        model.save_adapter(str(out / case), case, use_safetensors=not case.startswith("prefix"))
        found[case] = logits(model, base)
    if not decoder:
        found["fusion"] = fusion(base, out / "fusion")
    return found


def fusion(base: Path, out: Path) -> torch.Tensor:
    """A fusion, its adapters' folders inside its own."""
    model = model_of(base, False, ",".join(FUSED))
    for case in FUSED:
        added(model, case, POST_NORM)
    model.add_adapter_fusion(list(FUSED))
    shaken(model, (*(f".{case}." for case in FUSED), "adapter_fusion_layer", "heads."))
    model.set_active_adapters(composition.Fuse(*FUSED))
    out.mkdir()
    for case in FUSED:
        model.save_adapter(str(out / case), case, with_head=False, use_safetensors=True)
    model.save_adapter_fusion(str(out), list(FUSED), with_head=True, use_safetensors=True)
    return logits(model, base)


def load(base: Path, source: Path) -> dict[str, torch.Tensor]:
    """Logits of every folder that the other side wrote."""
    found: dict[str, torch.Tensor] = {}
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        head = json.loads((folder / "head_config.json").read_text())
        flexible = head["config"] is not None
        model = model_of(base, not flexible)
        if (folder / "adapter_fusion_config.json").is_file():
            names = json.loads((folder / "adapter_fusion_config.json").read_text())["adapter_names"]
            for name in names:
                model.load_adapter(str(folder / name), use_safetensors=True)
            model.load_adapter_fusion(str(folder), use_safetensors=True)
            model.set_active_adapters(composition.Fuse(*names))
            if flexible:
                model.active_head = head["name"]
        else:
            model.set_active_adapters(model.load_adapter(str(folder), use_safetensors=True))
        found[folder.name] = logits(model, base)
    return found


def main() -> None:
    """Entry point."""
    transformers.logging.set_verbosity_error()
    action, bases, *folders = sys.argv[1], *map(Path, sys.argv[2:])
    out = folders[-1]
    out.mkdir(parents=True, exist_ok=True)
    for base in sorted(bases.iterdir()):
        if action == "make":
            (out / base.name).mkdir()
            found = make(base, out / base.name)
        else:
            found = load(base, folders[0] / base.name)
        save_file(found, out / f"{base.name}.safetensors")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, adapters)}
    (out / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main()
