"""Threads that wait for each other sleep: a machine that does something else besides would spin its time away."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

POLICY, PASSIVE = "OMP_WAIT_POLICY", "passive"
# What a user may have said about it already, to any OpenMP runtime.
SAID = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_ours: list[str] = []


def sleep_while_waiting() -> bool:
    """Ask OpenMP's threads to sleep at barriers instead of spinning, unless the environment says something else.

    The runtime reads it when torch is imported, so it comes before that. Two cores of an AMD EPYC with AVX2: a training
    step of the demo took two thirds of the time while another process held one of them, and the same alone.

    Returns:
        whether it was set.
    """
    if "torch" in sys.modules or any(name in os.environ for name in SAID):
        return False
    os.environ[POLICY] = PASSIVE
    _ours.append(POLICY)
    return True


def as_found(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy without what was set here: latency is measured as libraries have it."""
    return {name: value for name, value in environment.items() if name not in _ours}
