"""Millions of rows: seconds until the first step and peak memory, first and again, next to `datasets` alone."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

import yaml

from benchmarks.options import positive
from compressft.data.rows import read_rows, sample_files
from compressft.utils.machine import hardware, versions

RESULT = Path(__file__).parent / "results" / "data.json"
CHARACTERS = 460
MIB = 2**20
# Seconds between two looks at the memory of all processes.
EVERY = 1.0
MODEL = "minilm"
LENGTH = 128
# What anybody would write: rows from the file, tokens of them, and the first batch.
PLAIN = """
import sys
import datasets
from transformers import AutoTokenizer
from compressft.model.source import resolve
tokenizer = AutoTokenizer.from_pretrained(resolve("minilm"))
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train")
encode = lambda some: tokenizer(some["text"], truncation=True, max_length=128)
rows = rows.map(encode, batched=True, num_proc=int(sys.argv[2]), remove_columns=["text"])
print(rows[:32]["input_ids"][0][:4], flush=True)
print("first step", file=sys.stderr, flush=True)
"""


@dataclass
class Start:
    """One start: seconds until the first step and in all, and the most memory, in MiB.

    `largest` is the greatest resident set of a single process, pages of mapped files among them; `together` the
    greatest sum over all processes of what is theirs alone, without mapped files.
    """

    name: str
    first_step: float | None
    seconds: float
    largest: float
    together: float


def write_rows(path: Path, number: int) -> None:
    """Rows of real sentences at random, each with one of ten labels; about half a kilobyte each."""
    if path.is_file():
        return
    texts = [row["text"] for row in read_rows(sample_files("banking77")["train"])]
    draws = random.Random(0)
    staging = path.with_suffix(".tmp")
    with staging.open("w", encoding="utf-8") as file:
        for i in range(number):
            text = draws.choice(texts)
            while len(text) < CHARACTERS:
                text += f" {draws.choice(texts)}"
            file.write(json.dumps({"text": text, "label": f"class {i % 10}"}) + "\n")
    staging.replace(path)


def write_recipe(folder: Path, rows: Path) -> Path:
    """A recipe of one step on all rows; a few others validate."""
    few = folder / "validation.jsonl"
    few.write_text("".join(rows.open(encoding="utf-8").readline() for _ in range(1)) * 16, encoding="utf-8")
    document = {
        "name": "many-rows",
        "model": MODEL,
        "task": "sequence-classification",
        "data": {"train": str(rows), "validation": str(few), "max_length": LENGTH},
        "stages": [{"name": "one", "method": "full", "train": {"max_steps": 1, "batch_size": 8, "save": "no"}}],
        "export": {"enabled": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            waiting += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except OSError:
            continue
    return found


def _field(pid: int, file: str, names: tuple[str, ...]) -> float:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) / 1024 for line in lines if line.split(":")[0] in names)


def measured(name: str, command: list[str], cache: Path) -> Start:
    """Run a command with a cache of its own, and look at its memory until it ends."""
    begun = time.perf_counter()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=cache.parent
    )
    said: list[str] = []
    first: list[float] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if not first and ("first step" in line or "step 1/1" in line):
                first.append(time.perf_counter() - begun)

    listener = Thread(target=listen)
    listener.start()
    largest = together = 0.0
    while process.poll() is None:
        family = _family(process.pid)
        largest = max([largest, *(_field(pid, "status", ("VmHWM",)) for pid in family)])
        together = max(together, sum(_field(pid, "smaps_rollup", ("Pss_Anon", "Pss_Shmem")) for pid in family))
        time.sleep(EVERY)
    listener.join()
    if process.returncode:
        raise RuntimeError(f"{name} failed:\n{''.join(said)[-4000:]}")
    seconds = time.perf_counter() - begun
    return Start(name, first[0] if first else None, seconds, largest, together)


def main(arguments: list[str]) -> int:
    """Make the rows, start twice from an empty cache, do the same with `datasets` alone, and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__)
    parser.add_argument("--rows", type=positive, default=2_000_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/data"), help="where the rows are kept")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / f"rows-{options.rows}.jsonl"
    write_rows(rows, options.rows)
    recipe = write_recipe(folder, rows)
    starts = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        ours, plain = Path(place) / "ours", Path(place) / "plain"
        for number, when in enumerate(("first", "again")):
            output = Path(place) / f"run-{number}"
            command = [sys.executable, "-m", "compressft", "run", str(recipe), "--output", str(output)]
            starts.append(measured(f"compressft, {when}", command, ours))
            print(starts[-1], flush=True)
            shutil.rmtree(output)
            command = [sys.executable, "-c", PLAIN, str(rows), str(os.cpu_count())]
            starts.append(measured(f"datasets alone, {when}", command, plain))
            print(starts[-1], flush=True)
        kept = sum(file.stat().st_size for file in ours.rglob("*") if file.is_file())
    found = {
        "rows": options.rows,
        "file_bytes": rows.stat().st_size,
        "cache_bytes": kept,
        "starts": [asdict(one) for one in starts],
        "hardware": hardware(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'':24}{'first step, s':>15}{'largest process, MiB':>24}{'own memory of all, MiB':>26}")
    for one in starts:
        first = "-" if one.first_step is None else f"{one.first_step:.1f}"
        print(f"{one.name:24}{first:>15}{one.largest:>24.0f}{one.together:>26.0f}")
    return 0
