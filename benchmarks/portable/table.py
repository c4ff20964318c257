"""The results as Markdown: a row for each file, a column for each machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LIMIT = 0.999
Document = Mapping[str, Any]


def cell(found: Mapping[str, Any] | None) -> str:
    """Worst agreement and largest error over the batch sizes; bold where it is below the limit."""
    if found is None:
        return ""
    if "error" in found:
        return "fails"
    agreement = min(c["agreement"] for c in found["comparisons"])
    error = max(c["error"] for c in found["comparisons"])
    text = f"{100 * agreement:.2f} %"
    return f"{f'**{text}**' if agreement < LIMIT else text}, {error:.2g}"


def below(document: Document) -> list[str]:
    """A line for each cell that misses the limit, or that has no figures."""
    lines = []
    for file in document["files"]:
        for machine in document["machines"]:
            found = of(document, file, machine)
            if found is None:
                continue
            if "error" in found:
                lines.append(f"{file} on {machine}: {found['error']}")
                continue
            worst = min(found["comparisons"], key=lambda c: c["agreement"])
            if worst["agreement"] < LIMIT:
                number = round((1 - worst["agreement"]) * worst["labels"])
                leads = ", ".join(f"{lead:.2g}" for lead in worst["missed"][:5])
                lines.append(
                    f"{file} on {machine}, batches of {worst['batch']}: {number} of {worst['labels']} labels differ; "
                    f"torch's lead over the runner-up there: {leads}{', ...' if len(worst['missed']) > 5 else ''}"
                )
    return lines


def of(document: Document, file: str, machine: str) -> Mapping[str, Any] | None:
    """The cell of a file as it is now on a machine."""
    for found in document["cells"].values():
        if (found["file"], found["machine"]) == (file, machine) and found["sha256"] == document["files"][file][
            "sha256"
        ]:
            return found
    return None


def render(document: Document) -> str:
    """Table, cells below the limit, machines, what else opened the file."""
    files, machines = document["files"], document["machines"]
    shown = [name for name in machines if any(of(document, file, name) for file in files)]
    lines = [
        f"# The same file on other processors ({document['date']})",
        "",
        f"`{document['command']}`",
        "",
        f"Share of labels that are torch's, and the largest logit difference from torch, on {document['rows']} fixed "
        f"rows of the test split, each by itself and in padded batches of 8; the worse of both. At least "
        f"{100 * LIMIT:.1f} % is asked for.",
        "",
        "| file | labels | torch itself | " + " | ".join(shown) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(shown),
    ]
    for name, file in files.items():
        cells = [cell(of(document, name, machine)) for machine in shown]
        lines.append(
            f"| {name} | {file['distinct']} of {file['labels']} | {file['itself']:.2g} | " + " | ".join(cells) + " |"
        )
    missed = below(document)
    lines += [
        "",
        "labels: different ones that torch gives, of how many answers. torch itself: how far its own logits of a row "
        "alone and in a batch are apart, at most: what one rounding does that falls the other way (with dynamic "
        "ranges, what another range does).",
        "",
        f"Files: {_listed(files)}.",
        "",
    ]
    lines += [f"Below {100 * LIMIT:.1f} %:" if missed else f"No cell is below {100 * LIMIT:.1f} %.", ""]
    lines += [*(f"- {line}" for line in missed), *([""] if missed else []), *_machines(machines)]
    if document.get("elsewhere"):
        lines += ["", "The demo's folder elsewhere:", ""]
        lines += [f"- {name}: {said}" for name, said in document["elsewhere"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return "\n".join([*lines, "", f"{document['processor']}; {versions}", ""])


def _listed(files: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {file['shows']}, {file['bytes'] / 1e6:.1f} MB" for name, file in files.items())


def _machines(machines: Mapping[str, Any]) -> Sequence[str]:
    lines = ["| machine | what it is | onnxruntime | adds pairs of u8 x s8 in 16 bits |", "| --- | --- | --- | --- |"]
    for name, machine in machines.items():
        if "lacks" in machine:
            lines.append(f"| {name} | {machine['shows']} | lacks {machine['lacks']} | |")
            continue
        told = f" ({', '.join(machine['processor'])})" if machine["processor"] else ""
        adds = "yes, saturating" if machine["saturates"] else "no"
        lines.append(f"| {name} | {machine['shows']}{told} | {machine['onnxruntime']} | {adds} |")
    return lines
