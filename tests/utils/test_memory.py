"""Freed memory stays with the process once that was asked for, until it is given back."""

import os
import subprocess
import sys
import weakref

import pytest
import torch

from compressft.utils.memory import release

PROGRAM = """
import sys
from compressft.utils.memory import give_back, keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = keep_freed_memory() if sys.argv[1] != "give back" else None
block = bytearray(64 << 20)
block[::4096] = bytes(len(block[::4096]))
before = resident()
# Behind it, so that it is a hole in the heap.
behind = bytearray(4096)
del block
if sys.argv[1] == "then give back":
    give_back()
print(kept, before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("mode", ["keep", "give back", "then give back"])
def test_keep_freed_memory(mode):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, "-c", PROGRAM, mode], text=True, env=environment).split()
    given_back = int(output[1])
    if mode == "keep":
        if output[0] == "False":
            pytest.skip("malloc is not glibc's")
        assert given_back < 8 << 20
    else:
        assert given_back > 56 << 20


def test_released_tensors_are_gone_whoever_has_the_module():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    model(torch.randn(3, 4)).sum().backward()
    value = weakref.ref(model[0].weight)
    release(model)
    assert value() is None
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model[0].weight.shape == (4, 4)
