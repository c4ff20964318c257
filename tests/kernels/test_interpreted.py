"""Runs interpreted/ in processes of its own: TRITON_INTERPRET must be set before triton is imported."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = FOLDER.parents[2]
# The longest first.
FILES = sorted(
    (path.name for path in FOLDER.glob("test_*.py")), key=lambda name: (name == "test_block_sparse.py", name)
)


def run(name):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(FOLDER / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcomes():
    with ThreadPoolExecutor(2) as pool:
        yield dict(zip(FILES, pool.map(run, FILES), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_interpreted(outcomes, name):
    outcome = outcomes[name]
    assert outcome.returncode == 0 and " passed" in outcome.stdout, outcome.stdout[-4000:] + outcome.stderr[-2000:]
