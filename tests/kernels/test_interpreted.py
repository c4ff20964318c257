"""Runs interpreted/ in a process of its own: TRITON_INTERPRET must be set before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]


def test_interpreted(request):
    share = ["--all"] if request.config.getoption("all") else []
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *share, str(FOLDER)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
