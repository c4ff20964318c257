"""Compare logits of adapters of the `adapters` package and of PEFT with ours, on the same weights, in both directions.

Each adapter is made and saved there, converted by the code of `compressft convert`, and computed here; then ours is
converted back, loaded there and computed once more. Evaluation mode, fp32, CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.parity.bases import write_bases
from benchmarks.parity.environment import HOME, environment
from compressft.adapters.convert import convert
from compressft.adapters.named_adapters import Adapted, get_model
from compressft.model.load import load_model
from compressft.utils.machine import hardware, versions
from compressft.utils.quiet import quiet_libraries

RESULTS = Path(__file__).parents[1] / "results"
LIMIT = 1e-5
HEAD = "AutoModelForSequenceClassification"
LENGTH = 6
# Methods that PEFT's format holds.
PEFT: dict[str, dict[str, Any]] = {
    "lora": {"type": "peft", "config": {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}},
    "prefix": {"type": "prefix", "length": LENGTH, "reparameterise": False},
}


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks parity`; 1 where a difference is above the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks parity", description=__doc__)
    parser.add_argument("--python", type=Path, help="python of an environment with the `adapters` package")
    parser.add_argument("--json", type=Path, default=RESULTS / "parity.json")
    options = parser.parse_args(arguments)
    quiet_libraries()
    work = HOME / "parity"
    shutil.rmtree(work, ignore_errors=True)
    bases = write_bases(work / "bases")
    python = options.python or environment()
    rows, theirs = beside_adapters(python, work, bases)
    rows += beside_peft(work, bases)
    document = {
        "date": date.today().isoformat(),
        "command": "python -m benchmarks parity",
        "limit": LIMIT,
        "passed": all(row["difference"] <= LIMIT for row in rows),
        "rows": rows,
        "versions": {**versions(), "peft": _version("peft")},
        "peer_versions": theirs,
        "hardware": hardware(),
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    options.json.with_suffix(".md").write_text(table(document), encoding="utf-8")
    print(table(document))
    return 0 if document["passed"] else 1


def beside_adapters(python: Path, work: Path, bases: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of every case on every base, theirs to ours and ours to theirs; the versions there."""
    _peer(python, "make", work / "bases", work / "theirs")
    ours: dict[str, dict[str, Tensor]] = {}
    rows = []
    for base in bases:
        ours[base] = {}
        for case, want in load_file(work / "theirs" / f"{base}.safetensors").items():
            folder, home = work / "ours" / base / case, work / "bases" / base
            convert(work / "theirs" / base / case, folder, base=str(home))
            ours[base][case] = got = computed(Adapted.from_pretrained(loaded(home), folder), home)
            convert(folder, work / "back" / base / case, "adapterhub", str(home))
            rows.append(row("adapters", base, case, "to ours", got, want))
    _peer(python, "load", work / "bases", work / "back", work / "there")
    for base in bases:
        for case, got in load_file(work / "there" / f"{base}.safetensors").items():
            rows.append(row("adapters", base, case, "from ours", got, ours[base][case]))
    return rows, json.loads((work / "theirs" / "versions.json").read_text(encoding="utf-8"))


def _peer(python: Path, *arguments: str | Path) -> None:
    script = Path(__file__).with_name("peer.py")
    done = subprocess.run([str(python), str(script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script.name} failed:\n{done.stderr}")


def beside_peft(work: Path, bases: list[str]) -> list[dict[str, Any]]:
    """Rows of what PEFT's format holds: ours computed by PEFT, and what PEFT saves of it computed by us."""
    from peft import PeftModel

    rows = []
    for base in bases:
        home = work / "bases" / base
        for case, fields in PEFT.items():
            if case == "prefix" and base == "distilbert":
                # PEFT has no prefixes for it.
                continue
            fields = dict(fields)
            if case == "prefix" and hasattr(loaded(home).base_model, "embeddings"):
                # PEFT moves the positions of encoders' rows behind the prefix.
                fields["shift_positions"] = True
            adapted = get_model(loaded(home), fields)
            _shake(adapted)
            want = computed(adapted, home)
            folder = work / "peft" / base / case
            assert adapted.save_pretrained(folder) == {"default": "peft"}, (base, case)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theirs = PeftModel.from_pretrained(loaded(home), str(folder))
                rows.append(row("peft", base, case, "from ours", computed(theirs, home), want))
                theirs.save_pretrained(str(folder / "again"))
            again = Adapted.from_pretrained(loaded(home), folder / "again")
            rows.append(row("peft", base, case, "to ours", computed(again, home), want))
    return rows


def loaded(folder: Path) -> Any:
    """A base, in eval mode."""
    return load_model(str(folder), HEAD).eval()


def computed(model: Any, base: Path) -> Tensor:
    """Logits on the base's inputs."""
    with torch.no_grad():
        return model.eval()(**load_file(base / "inputs.safetensors")).logits


def _shake(adapted: Adapted) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in adapted.model.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)


def row(peer: str, base: str, case: str, direction: str, got: Tensor, want: Tensor) -> dict[str, Any]:
    """One comparison."""
    return {
        "peer": peer,
        "base": base,
        "case": case,
        "direction": direction,
        "difference": float((got - want).abs().max()),
        "largest_logit": float(want.abs().max()),
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def table(document: dict[str, Any]) -> str:
    """The results as Markdown: the larger difference of both directions, per case and base."""
    bases = list(dict.fromkeys(row["base"] for row in document["rows"]))
    cases = list(dict.fromkeys((row["peer"], row["case"]) for row in document["rows"]))
    lines = [
        f"# Parity of converted adapters ({document['date']})",
        "",
        f"`{document['command']}`",
        "",
        "Largest absolute difference of logits, both directions (their adapter converted and computed by compressft, "
        f"ours converted and computed by them), fp32, evaluation mode; at most {document['limit']:g} is asked for: "
        + ("passed." if document["passed"] else "NOT passed."),
        "",
        "| package | adapter | " + " | ".join(bases) + " |",
        "| --- | --- |" + " ---: |" * len(bases),
    ]
    for peer, case in cases:
        cells = []
        for base in bases:
            found = [
                r["difference"] for r in document["rows"] if (r["peer"], r["case"], r["base"]) == (peer, case, base)
            ]
            cells.append(f"{max(found):.1e}" if found else "")
        lines.append(f"| {peer} | {case} | " + " | ".join(cells) + " |")
    here, there = document["versions"], document["peer_versions"]
    lines += [
        "",
        "minilm has real weights, the others are random with three layers. Empty: that adapter computes something else "
        "in both packages there, or one of them has none; converting it is refused with the reason. The `adapters` "
        "package runs with eager attention: next to SDPA's masks it hides a decoder's prefix.",
        "",
        "Here: " + ", ".join(f"{k} {v}" for k, v in here.items()) + ". There: "
        + ", ".join(f"{k} {v}" for k, v in there.items()) + ".",
        "",
    ]  # fmt: skip
    return "\n".join(lines)
