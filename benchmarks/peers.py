"""Training speed and memory of our adapters, prefixes, LoRA and DoRA, and of `peft`'s and `adapters`', in one run.

Contestants of a family train the same parameters of the same model on the same batch with the same optimiser, each in
a process of its own; they take their steps in turns. The `adapters` package has an environment of its own, because it
wants an older transformers (`benchmarks.parity.environment`). With --shipped ours runs with the allocator settings of
`compressft run` and the others without, as each is used; without it, nobody has them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.options import positive
from benchmarks.race import Conditions, Contestant, race, ratio
from compressft.model.source import resolve
from compressft.utils.machine import hardware, usable_cores, versions

RESULTS = Path(__file__).parent / "results"
# How much less time than the quickest peer is the goal.
GOAL = 1.3
LENGTH, RANK, REDUCTION = 10, 8, 16
LORA = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["query", "value"]}
# All of ours train the pooler with the head; Houlsby et al. train every LayerNorm too.
POOLER, NORMS = ("pooler",), ("pooler", "LayerNorm")


def houlsby(activation: str) -> dict[str, Any]:
    """Our adapter with the peer's width and activation."""
    return {"type": "adapter", "placement": "houlsby", "reduction_factor": REDUCTION, "activation": activation}


def families(theirs: Path) -> dict[str, dict[str, Contestant]]:
    """Name -> contestants that compute the same thing, ours first.

    Args:
        theirs: python of the environment with the `adapters` package.
    """

    def ours(**method: Any) -> Contestant:
        return Contestant("compressft", method)

    def library(config: str, also: tuple[str, ...] = POOLER, **fields: Any) -> Contestant:
        return Contestant("adapters", {"config": config, **fields}, theirs, also)

    def peft(**config: Any) -> Contestant:
        return Contestant("peft", config, also=POOLER)

    return {
        "Pfeiffer adapter": {
            "compressft adapter": ours(type="adapter", placement="pfeiffer", reduction_factor=REDUCTION),
            "adapters seq_bn": library("SeqBnConfig", reduction_factor=REDUCTION),
        },
        "Houlsby adapter": {
            "compressft adapter": ours(**houlsby("silu")),
            "adapters double_seq_bn": library("DoubleSeqBnConfig", NORMS, reduction_factor=REDUCTION),
        },
        "Prefix": {
            "compressft prefix": ours(type="prefix", length=LENGTH, hidden=512),
            "peft PREFIX_TUNING": peft(
                peft_type="PREFIX_TUNING", num_virtual_tokens=LENGTH, prefix_projection=True, encoder_hidden_size=512
            ),
            "adapters prefix_tuning": library("PrefixTuningConfig", prefix_length=LENGTH, bottleneck_size=512),
        },
        "LoRA": {
            "compressft peft": ours(type="peft", config={"peft_type": "LORA", **LORA}),
            "peft LORA": peft(peft_type="LORA", **LORA),
            "adapters lora": library("LoRAConfig", r=RANK, alpha=2 * RANK),
        },
        # The `adapters` package has none.
        "DoRA": {
            "compressft peft": ours(type="peft", config={"peft_type": "LORA", "use_dora": True, **LORA}),
            "peft LORA, use_dora": peft(peft_type="LORA", use_dora=True, **LORA),
        },
    }


def compare(
    theirs: Path, conditions: Conditions, shipped: bool, console: Console, chosen: Callable[[str], bool]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Family -> contestant -> what `race` found, with `ratio`: its step time over ours."""
    found = {}
    for name, contestants in families(theirs).items():
        if not chosen(name):
            continue
        if shipped:
            contestants = {one: replace(c, keep_memory=c.package == "compressft") for one, c in contestants.items()}
        results = race(contestants, conditions, console)
        ours = next(iter(results.values()))
        found[name] = {one: {**result, "ratio": ratio(result, ours)} for one, result in results.items()}
    return found


def verdicts(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """For each family: whether ours is no slower than any peer, quicker by the goal, and saves no more."""
    lines = []
    for name, results in found.items():
        ours, *peers = results.values()
        ran = [peer for peer in peers if "error" not in peer]
        if "error" in ours or not ran:
            lines.append(f"{name}: not measured")
            continue
        least = min(peer["ratio"] for peer in ran)
        speed = "quicker by the goal" if least >= GOAL else "no slower" if least >= 1 else "**slower**"
        saved = min(peer["saved_bytes"] for peer in ran)
        memory = "no more" if ours["saved_bytes"] <= saved else "**more**"
        lines.append(
            f"{name}: {speed} ({least:.2f}x against the quickest peer; goal {GOAL}x), saves {memory} for the backward "
            f"pass ({ours['saved_bytes'] / 1e6:.1f} MB, the least of the peers' {saved / 1e6:.1f} MB)"
        )
    return lines


def table(document: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# Training next to peers ({document['date']})", "", f"`{document['command']}`", ""]
    lines += [f"- {line}" for line in verdicts(document["families"])]
    for name, results in document["families"].items():
        lines += ["", f"## {name}", "", "| | trained | step | over ours | peak memory | saved activations |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for one, result in results.items():
            if "error" in result:
                lines.append(f"| {one} | {result['error']} | - | - | - | - |")
                continue
            figures = f"{result['step_ms']:.1f} ms | {result['ratio']:.2f}x | {result['peak_bytes'] / 1e6:.0f} MB"
            lines.append(f"| {one} | {result['trained']:,} | {figures} | {result['saved_bytes'] / 1e6:.1f} MB |")
    about, machine = document["conditions"], document["hardware"]
    where = machine.get("gpu", "no GPU") if about["device"] == "cuda" else f"{about['threads']} threads"
    packages = {
        package: number
        for results in document["families"].values()
        for result in results.values()
        for package, number in result.get("versions", {}).items()
        if package not in document["versions"]
    }
    lines += [
        "",
        f"32 rows of 64 tokens, MiniLM-L6, {about['precision']}, AdamW, dropout on; {about['rounds']} rounds of "
        f"{about['steps']} steps in turns, medians. Peak memory: the process's, less what its libraries take. Saved "
        "activations: what autograd keeps of one forward pass, each storage once, parameters left out.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {where}; "
        + ", ".join(f"{name} {value}" for name, value in {**document["versions"], **packages}.items()),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Entry point of `python -m benchmarks peers`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("families", nargs="*", help="beginnings of families' names (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--steps", type=positive, default=10, help="steps in each round")
    parser.add_argument("--threads", type=positive, default=usable_cores())
    parser.add_argument("--shipped", action="store_true", help="ours with the allocator settings of `compressft run`")
    parser.add_argument("--python", type=Path, help="python of an environment with the `adapters` package")
    parser.add_argument("--json", type=Path, help="where results go (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    asked = [name.lower() for name in options.families]

    def chosen(family: str) -> bool:
        return not asked or any(family.lower().startswith(name) for name in asked)

    if options.python is None:
        from benchmarks.parity.environment import environment

        options.python = environment()
    conditions = Conditions(
        resolve("minilm"), options.device, options.precision, options.rounds, options.steps, options.threads
    )
    found = compare(options.python, conditions, options.shipped, Console(stderr=True), chosen)
    if not found:
        parser.error(f"no family's name begins with {options.families}")
    command = ["python -m benchmarks peers", *options.families, f"--device {options.device}"]
    command += [f"--precision {options.precision}", *(["--shipped"] if options.shipped else [])]
    command += [f"--rounds {options.rounds}", f"--steps {options.steps}"]
    document = {
        "date": date.today().isoformat(),
        "command": " ".join(command),
        "conditions": {key: value for key, value in vars(conditions).items() if key != "model"},
        "families": found,
        "versions": versions(),
        "hardware": hardware(),
    }
    path = options.json or RESULTS / f"peers-{options.device}-{options.precision}{'-shipped' * options.shipped}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    path.with_suffix(".md").write_text(table(document), encoding="utf-8")
    print(table(document))
    return 0
