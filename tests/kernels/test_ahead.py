"""What ships compiles for devices that are not here, and its machine code keeps the promises that speed needs."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.share import rank, tree

HERE = Path(__file__).parent
# The interpreter would replace the kernels: processes of their own compile.
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import shipped
some = int(sys.argv[4]) or None
print(json.dumps(shipped.compile_all(sys.argv[2], int(sys.argv[3]), some, sys.argv[5])))
"""
TABLE = json.loads((HERE.parents[1] / "kernels" / "compressft_kernels" / "table.json").read_text(encoding="utf-8"))
# One case of so many besides those that cover the table's rows, exact float32 among them.
SHARES = {"sm_90": 400, "sm_80": 800, "sm_89": 1600}
ENTRIES = sorted(name for name in TABLE if name.startswith("sm_"))
# `make test` compiles so many cases for one device, drawn by the tree's hash.
DRAWN, SOME = min(ENTRIES, key=rank), 8


def entries(*but):
    """Values for `parametrize`."""
    return [
        name if name == DRAWN else pytest.param(name, marks=pytest.mark.full) for name in ENTRIES if name not in but
    ]


@pytest.fixture
def compiled(request):
    """entry -> what its cases compile to."""
    some = 0 if request.config.getoption("all") else SOME
    return lambda entry: compile_in_a_process(entry, some)


@cache
def compile_in_a_process(entry, some):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    command = [sys.executable, "-c", SCRIPT, str(HERE), entry, str(SHARES[entry]), str(some), tree()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("entry", entries())
def test_nothing_spills_and_everything_fits(entry, compiled):
    kernels = compiled(entry)["kernels"]
    assert kernels
    assert not [(k["case"], k["kernel"], k["faults"]) for k in kernels if k["faults"]]


@pytest.mark.parametrize("entry", entries())
def test_every_row_of_the_table_was_compiled(entry, compiled):
    assert not compiled(entry)["unused"]


@pytest.fixture
def products(compiled, request):
    """Kernels with a product, other than those of some kinds of case; a draw may have none."""

    def products(entry, *but):
        kernels = compiled(entry)["kernels"]
        found = [k for k in kernels if k["dots"] and not any(f" {kind} " in k["case"] for kind in but)]
        assert found or not request.config.getoption("all")
        return found

    return products


@pytest.mark.parametrize("entry", entries("sm_80", "sm_89"))
def test_sm_90_multiplies_by_warpgroups(entry, products):
    for k in products(entry, "float32", "tf32"):
        assert k["hgmma"] and not k["hmma"], (k["case"], k["kernel"])


@pytest.mark.parametrize("entry", entries())
def test_tf32_takes_tensor_cores(entry, products):
    """On sm_90 some of either kind: its warpgroup product of tf32 reads transposed operands in one order only."""
    for k in products(entry, "float32", "bfloat16", "float16"):
        assert k["hmma"] or k["hgmma"], (k["case"], k["kernel"])


# sm_89 has no such rows of its own.
@pytest.mark.parametrize("entry", entries("sm_89"))
def test_exact_float32_takes_none(entry, products):
    for k in products(entry, "tf32", "bfloat16", "float16"):
        assert not k["hmma"] and not k["hgmma"], (k["case"], k["kernel"])


@pytest.mark.parametrize("entry", entries("sm_90"))
def test_others_multiply_by_warps(entry, products):
    assert not [(k["case"], k["kernel"]) for k in products(entry, "float32") if not k["hmma"]]


# What has no 16 adjacent bytes: a float32 scale per NF4 block, two float32 statistics per row of the attention's
# backward; and tiles so small that a thread copies less.
SCATTERED = ("nf4", "prefix backward", " 16 wide", "tiles of 16", "tiles of 32")


@pytest.mark.parametrize("entry", entries())
def test_inner_loops_copy_16_bytes_at_a_time(entry, products):
    for k in products(entry, "float32", "tf32"):
        assert k["wide"] > 0 or " 16 wide" in k["case"] or "tiles of 16" in k["case"], (k["case"], k["kernel"])
        assert k["narrow"] == 0 or any(kind in k["case"] for kind in SCATTERED), (k["case"], k["kernel"])
