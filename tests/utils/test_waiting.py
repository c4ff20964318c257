"""Waiting threads sleep by default; a user's own setting, and what is measured, stay as they were."""

import json
import subprocess
import sys

import pytest

from compressft.utils import waiting

SHOW = """
import json, os, sys
from compressft.export.measure import child_environment
from compressft.utils.waiting import sleep_while_waiting
assert "torch" not in sys.modules
done = sleep_while_waiting()
print(json.dumps([done, os.environ.get("OMP_WAIT_POLICY"), child_environment().get("OMP_WAIT_POLICY")]))
"""


def shown(monkeypatch, **environment):
    for name in waiting.SAID:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, [True, "passive", None]),
        ({"OMP_WAIT_POLICY": "active"}, [False, "active", "active"]),
        ({"GOMP_SPINCOUNT": "1000"}, [False, None, None]),
        ({"KMP_BLOCKTIME": "0"}, [False, None, None]),
    ],
)
def test_a_setting_of_ones_own_is_left_alone(environment, want, monkeypatch):
    assert shown(monkeypatch, **environment) == want


def test_too_late_once_torch_is_there(monkeypatch):
    import torch

    assert torch
    monkeypatch.delenv(waiting.POLICY, raising=False)
    assert not waiting.sleep_while_waiting()
