"""Imports without collections, and the collector as it was afterwards."""

import gc
import subprocess
import sys

import pytest

from compressft.utils.collector import importing


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_a_process_ends_without_a_collection():
    """What is registered before `end_quickly` runs after it: everything is frozen by then."""
    program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))
from compressft.utils.collector import end_quickly
end_quickly()
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "True"
