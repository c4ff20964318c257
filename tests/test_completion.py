"""Shell completion: what `--install-completion` installs asks the program, which answers with commands and recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def answered(words: str, number: int) -> list[str]:
    """What is offered for the last of these words in bash."""
    environment = {"COMP_WORDS": words, "COMP_CWORD": str(number), "_COMPRESSFT_COMPLETE": "complete_bash"}
    environment |= {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])} | environment
    program = "import sys; sys.argv[0] = 'compressft'; from compressft.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_and_shipped_recipes_are_completed():
    assert {"push", "plan"} <= set(answered("compressft p", 1))
    assert answered("compressft run banking77-ti", 2) == ["banking77-tiny"]


def test_help_offers_it(call):
    shown = call("--help")
    assert shown.code == 0 and "--install-completion" in shown.out and "--show-completion" in shown.out
