"""What ships compiles for devices that are not here, and its machine code keeps the promises that speed needs."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from compressft_kernels import dispatch

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
# Each kind of device, and one case of so many besides those that cover its rows of the table.
SHARES = {"sm_80": 800, "sm_86": 1600, "sm_89": 1600, "sm_90": 400, "sm_100": 1600, "sm_120": 1600}
# `make test` compiles so many cases for one of them, drawn by the tree's hash.
DRAWN, SOME = min(SHARES, key=rank), 8


def targets(*some):
    """Values for `parametrize`."""
    among = some or SHARES
    return [name if name == DRAWN else pytest.param(name, marks=pytest.mark.full) for name in among]


@pytest.fixture
def compiled(request):
    """target -> what its cases compile to."""
    some = 0 if request.config.getoption("all") else SOME
    return lambda target: compile_in_a_process(target, some)


@cache
def compile_in_a_process(target, some):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    command = [sys.executable, "-c", SCRIPT, str(HERE), target, str(SHARES[target]), str(some), tree()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_entry_of_the_table_is_some_devices():
    shipped_for = {dispatch.table_of(divmod(int(name.removeprefix("sm_")), 10)) for name in SHARES}
    assert shipped_for == {name for name in dispatch.TABLE if name.startswith("sm_")}


@pytest.mark.parametrize("target", targets())
def test_nothing_spills_and_everything_fits(target, compiled):
    kernels = compiled(target)["kernels"]
    assert kernels
    assert not [(k["case"], k["kernel"], k["faults"]) for k in kernels if k["faults"]]


@pytest.mark.parametrize("target", targets())
def test_every_row_of_the_table_was_compiled(target, compiled):
    assert not compiled(target)["unused"]


@pytest.fixture
def products(compiled, request):
    """Kernels with a product, other than those of some kinds of case; a draw may have none."""

    def products(target, *but):
        kernels = compiled(target)["kernels"]
        found = [k for k in kernels if k["dots"] and not any(f" {kind} " in k["case"] for kind in but)]
        assert found or not request.config.getoption("all")
        return found

    return products


HALVES_BY = {"sm_90": "hgmma", "sm_100": "utcmma"}


@pytest.mark.parametrize("target", targets())
def test_half_precision_takes_the_devices_widest_products(target, products):
    """By warpgroups on sm_90, in tensor memory on sm_100, by warps elsewhere."""
    want = HALVES_BY.get(target, "hmma")
    for k in products(target, "float32", "tf32"):
        assert [name for name in ("hgmma", "utcmma", "hmma") if k[name]] == [want], (k["case"], k["kernel"])


@pytest.mark.parametrize("target", targets())
def test_tf32_takes_tensor_cores(target, products):
    """On sm_90 some of either kind: its warpgroup product of tf32 reads transposed operands in one order only."""
    for k in products(target, "float32", "bfloat16", "float16"):
        assert k["hmma"] or k["hgmma"] or k["utcmma"], (k["case"], k["kernel"])


# The others' cases have no exact float32: its rows of the table are tf32's too.
@pytest.mark.parametrize("target", targets("sm_80", "sm_90"))
def test_exact_float32_takes_none(target, products):
    for k in products(target, "tf32", "bfloat16", "float16"):
        assert not k["hmma"] and not k["hgmma"], (k["case"], k["kernel"])


# What has no 16 adjacent bytes: a float32 scale per NF4 block, eight bytes of mask a row, two float32 statistics per
# row of the attention's backward; and tiles so small that a thread copies less.
SCATTERED = ("nf4", " bits", "prefix backward", " 16 wide", "tiles of 16", "tiles of 32")


@pytest.mark.parametrize("target", targets())
def test_inner_loops_copy_16_bytes_at_a_time(target, products):
    for k in products(target, "float32", "tf32"):
        assert k["wide"] > 0 or " 16 wide" in k["case"] or "tiles of 16" in k["case"], (k["case"], k["kernel"])
        # A residual's tile of 2 KB is 8 bytes for each of 256 threads; sm_100's loop copies it ahead as well.
        residual = target == "sm_100" and k["kernel"] == "_forward_kernel" and k["case"].endswith("residual")
        allowed = 2 if residual else 0
        assert k["narrow"] <= allowed or any(kind in k["case"] for kind in SCATTERED), (k["case"], k["kernel"])


def waiting(k):
    """How many plain loads are in one loop that multiplies, next to those that are meant to be."""
    # The adapter's second loops add a bias, a residual or the norm's part to a product, which does not wait for them.
    own = k["case"].startswith("adapter") and k["kernel"] in ("_forward_kernel", "_rows_kernel")
    # Asynchronous copies have four bytes at least: a row has one of double quantisation's scales, and of a tile of 512
    # bytes of mask each of 256 threads has two.
    fewer = ("nf4 double" in k["case"]) + (" bits" in k["case"])
    # Which tile comes next is read from a list, one step ahead; where it lies from another when they are turned.
    fewer += k["case"].startswith("sparse ") + k["case"].startswith("sparse backward")
    return max(k["loads"][:1] if own else k["loads"]) - fewer


@pytest.mark.parametrize("target", targets())
def test_inner_loops_wait_for_no_load(target, products):
    for k in products(target, "float32", "tf32"):
        assert waiting(k) <= 0, (k["case"], k["kernel"], k["loads"])
