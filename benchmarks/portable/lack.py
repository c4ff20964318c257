"""What a machine lacks, and the commands that fill its folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


class Lack(RuntimeError):
    """Something is missing: one line that says what, and how to get it."""


def installed(*names: str, of: str) -> str:
    """The path of the first of these programs that there is; `of` is the package that has it."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    raise Lack(f"{names[0]} ({of})")


def done(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    """Run a command for its output; a failure is a lack of `what` with the last line that it wrote."""
    try:
        run = subprocess.run(list(command), capture_output=True, text=True, cwd=folder)
    except OSError as error:
        raise Lack(f"{what} ({command[0]}: {error.strerror})") from None
    if run.returncode:
        said = (run.stderr or run.stdout).strip().splitlines()
        raise Lack(f"{what} ({said[-1] if said else f'{command[0]} ended with exit code {run.returncode}'})")
    return run.stdout
