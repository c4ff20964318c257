"""Freed memory stays with the process once that was asked for."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from compressft.memory import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
block = bytearray(64 << 20)
block[::4096] = bytes(len(block[::4096]))
before = resident()
del block
print(kept, before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("mode", ["keep", "give back"])
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
