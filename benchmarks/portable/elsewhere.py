"""The demo's folder in packages that know nothing of compressft: plain `optimum`, and transformers.js."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.parity.environment import install
from benchmarks.portable.lack import Lack, installed
from benchmarks.portable.rows import sample
from benchmarks.portable.wasm import install_package
from compressft.evaluation.logits import model_logits
from compressft.model.saved.compressed import load_compressed
from compressft.model.source import load_tokenizer
from compressft.recipe.recipe import load_recipe
from compressft.run.again import finished_run
from compressft.run.feed import load_shipped

HERE = Path(__file__).parent
ROWS = 32
# Its releases want an older transformers than ours.
OPTIMUM = ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6")
TRANSFORMERS_JS = "4.3.2"


@dataclass(frozen=True)
class Asked:
    """Texts, and what they are here: token ids and torch's logits of each."""

    texts: tuple[str, ...]
    ids: tuple[list[int], ...]
    logits: tuple[list[float], ...]
    max_length: int


def asked(root: Path) -> Asked:
    """Some rows of the report's split of a finished run, each computed by itself."""
    run = finished_run(root)
    recipe = load_recipe(run / "recipe.yaml")
    shipped = load_shipped(recipe, load_tokenizer(str(run / "model")))
    task, splits = shipped.task, shipped.splits
    rows = sample(getattr(splits, splits.report_split), ROWS)
    features = task.encode(rows)
    logits = model_logits(load_compressed(run / "model"), task, features, 1)
    ids = tuple(feature["input_ids"] for feature in features)
    return Asked(tuple(row["text"] for row in rows), ids, tuple(row.tolist() for row in logits), task.max_length)


def tried(run: Path, folder: Path, console: Console) -> dict[str, str]:
    """What each package said, in a line."""
    question, found = asked(run), {}
    ways: dict[str, Callable[[], list[str]]] = {
        "optimum, ORTModelForSequenceClassification": lambda: _optimum(),
        "transformers.js, as the folder is": lambda: _transformers_js(folder, "onnx"),
        "transformers.js, with subfolder ''": lambda: _transformers_js(folder, ""),
    }
    for name, way in ways.items():
        try:
            found[name] = outcome(answered(way(), run / "onnx", question), question)
        except Lack as lack:
            found[name] = f"not tried; lacks {lack}"
        except RuntimeError as error:
            found[name] = f"fails: {error}"
        console.print(f"{name}: {found[name]}", highlight=False, markup=False)
    return found


def _optimum() -> list[str]:
    try:
        python = install("optimum", OPTIMUM, ("torch", "safetensors", "numpy"))
    except subprocess.CalledProcessError as error:
        raise Lack(f"{', '.join(OPTIMUM)} (pip ended with exit code {error.returncode})") from None
    return [str(python), str(HERE / "optimum_peer.py")]


def _transformers_js(folder: Path, subfolder: str) -> list[str]:
    node, place = installed("node", of="Node.js"), (folder / f"transformers-js-{TRANSFORMERS_JS}").resolve()
    install_package(place, "@huggingface/transformers", TRANSFORMERS_JS)
    return [node, str(HERE / "transformers_peer.mjs"), str(place), subfolder]


def answered(command: Sequence[str], model: Path, question: Asked) -> dict[str, Any]:
    """What a peer's script writes: {"versions", "ids", "logits"}.

    Raises:
        RuntimeError: it failed; its error's first line.
    """
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        job.write_text(json.dumps({**asdict(question), "model": str(model.resolve())}), encoding="utf-8")
        done = subprocess.run([*command, str(job), str(answer)], capture_output=True, text=True)
        if not answer.is_file():
            said = [line for line in (done.stderr or done.stdout).splitlines() if "Error" in line]
            line = said[-1].strip() if said else f"ended with exit code {done.returncode}"
            raise RuntimeError(line.replace(str(model.resolve()), model.name))
        return json.loads(answer.read_text(encoding="utf-8"))


def outcome(answer: dict[str, Any], question: Asked) -> str:
    """One line of it; the difference is that of texts that become the same tokens."""
    want, got = np.array(question.logits, np.float32), np.array(answer["logits"], np.float32)
    pairs = list(zip(answer["ids"], question.ids, strict=True))
    same = np.array([list(one) == list(other) for one, other in pairs])
    # transformers.js cuts a long text behind its last token, so that it loses its [SEP].
    cut = sum(list(one) != list(other) and len(other) == question.max_length for one, other in pairs)
    labels, number = int((want.argmax(-1) == got.argmax(-1)).sum()), len(want)
    tokens = f"{same.sum()} of {number} texts become the same tokens{f' ({cut} that is cut does not)' if cut else ''}"
    error = np.abs(want - got)[same].max() if same.any() else float("nan")
    labelled = f"{labels} of {number} labels are torch's, largest logit difference {error:.2g}"
    return f"opens ({answer['versions']}); {tokens}, {labelled}"
