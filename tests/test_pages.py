"""A newcomer's way: every command and every piece of Python that a page shows is parsed, and run on a few rows.

Pages are followed from top to bottom in one folder, which holds what a reader has: a recipe, rows, a batch. Runs get
`--smoke` and a base of two layers. What cannot run here says why in a comment above its block.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer

from benchmarks.registry import BENCHMARKS
from compressft import cli
from compressft.model.source import load_tokenizer, resolve
from compressft.passes import PASSES
from compressft.recipe import recipe as recipes
from tests.pages import PAGES, ROOT, Block, blocks
from tests.tiny_folder import write_jsonl

# Blocks that do not run here, by page; a new one is counted here, with its reason above it.
NOT_RUN = {"README": 2, "CONTRIBUTING": 1, "train": 2}
# Programs that blocks may call; all but ours only where the block does not run.
PROGRAMS = ("compressft", "make", "pip", "python", "torchrun", "accelerate")
LABELS, ROWS = 6, 12
FOLLOWED = [page for page in PAGES if any(block.language in ("bash", "python") for block in blocks(page))]


def parsed(words: list[str]) -> typer.Context:
    """A command of ours through the real parser, which checks options, types and the number of arguments."""
    command: Any = typer.main.get_command(cli.app)
    rest = words[1 : words.index(">")] if ">" in words else words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{shlex.join(words)}: no such command"
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context(command.name, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_fenced_known_and_parse(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(rf"^    (?:{'|'.join(PROGRAMS)}) .*$", text, re.M), "commands stand in ```bash blocks"
    for block in blocks(page):
        for words in block.commands:
            assert words[0] in PROGRAMS and (words[0] == "compressft" or block.reason), shlex.join(words)
            if words[0] == "compressft":
                parsed(words)
    for name in re.findall(r"python -m benchmarks ([a-z_]+)", text):
        assert name in BENCHMARKS, name
    for name in re.findall(r"`compressft ([a-z]+)[` ]", text):
        assert name in typer.main.get_command(cli.app).commands, name  # type: ignore[attr-defined]


def test_a_wrong_command_does_not_parse():
    for line in ("compressft run", "compressft plan a.yaml --memry 1GiB", "compressft run a.yaml b.yaml"):
        # Of which a bad parameter is one.
        with pytest.raises(typer.BadParameter.__base__):  # type: ignore[arg-type]
            parsed(shlex.split(line))


def test_what_does_not_run_is_counted_and_says_why():
    for page in PAGES:
        skipped = [block for block in blocks(page) if block.reason is not None]
        assert len(skipped) == NOT_RUN.get(page.stem, 0), page.stem
        assert all(len(str(block.reason).split()) > 3 for block in skipped)


# Following a page.


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """MiniLM of two layers."""
    folder = tmp_path_factory.mktemp("base")
    transformers.AutoModel.from_pretrained(resolve("minilm"), num_hidden_layers=2).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)
    return folder


def presume(page: Path, folder: Path) -> None:
    """Put what a reader has into a folder: the page's recipe (else the README's) as my.yaml, and its rows."""
    shown = [block for one in (page, PAGES[0]) for block in blocks(one) if block.language == "yaml"]
    (folder / "my.yaml").write_text(next(block.text for block in shown if "\nextends:" in f"\n{block.text}"))
    lines = (ROOT / "compressft" / "data" / "samples" / "banking77" / "train.jsonl").read_text().splitlines()
    by_label: dict[str, list[dict[str, str]]] = {}
    for row in map(json.loads, lines):
        by_label.setdefault(row["label"], []).append({"question": row["text"], "intent": row["label"]})
    some = [rows[: 2 * ROWS] for rows in list(by_label.values())[:LABELS]]
    write_jsonl(folder / "intents.jsonl", [row for rows in some for row in rows[:ROWS]])
    for name in ("intents-test.jsonl", "new.jsonl"):
        write_jsonl(folder / name, [row for rows in some for row in rows[ROWS:]])


@pytest.fixture
def python(monkeypatch, base) -> Any:
    """Runs Python as a page shows it, in one namespace; recipes are read as `--smoke` reads them."""
    read, passes = recipes.load_recipe, dict(PASSES)
    few = ["export.latency_rounds=1", f"model={base}"]
    monkeypatch.setattr(recipes, "load_recipe", lambda name, sets=(): recipes.smoke(read(name, [*sets, *few])))
    batch = dict(load_tokenizer("minilm")(["one text", "another", "a third"], padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([0, 1, 0])
    names: dict[str, Any] = {"batch": batch, "batches": [batch, batch]}

    def run(block: Block) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, str(block.page), "exec"), names)

    yield run
    for name in set(PASSES) - set(passes):
        del PASSES[name]


def follow(words: list[str], call: Any, base: Path) -> None:
    """One command, as it stands; a run on a few rows."""
    arguments, _, file = (words[1 : words.index(">")], ">", words[-1]) if ">" in words else (words[1:], "", "")
    if arguments[0] == "run":
        arguments = [*arguments, *([] if "--smoke" in arguments else ["--smoke"]), "--set", f"model={base}"]
    done = call(*arguments)
    assert done.code == 0, f"{shlex.join(words)}: {done.err}"
    if file:
        Path(file).write_text(done.out, encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize("page", FOLLOWED, ids=lambda page: page.stem)
def test_a_page_can_be_followed(page, call, python, base, tmp_path, monkeypatch):
    presume(page, tmp_path)
    for block in blocks(page):
        if block.reason is None and block.language == "python":
            python(block)
        for words in block.commands if block.reason is None else ():
            follow(words, call, base)
