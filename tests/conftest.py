"""For every test: no model hub, one torch thread, the same random numbers, its share of cases, and its CPU seconds."""

import atexit
import copy
import gc
import os
import random
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# A cache of this process's own and of those that it starts: what another run of the tests has left proves nothing.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="compressft-tests-")

import numpy as np
import pytest
import torch
from hypothesis import settings

from compressft.utils.collector import end_quickly
from tests.budget import Budget
from tests.command_line import call  # noqa: F401 - a fixture for all
from tests.share import Share

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
# Not 0, which many a test seeds its models with.
SEED = 1729
# The same inputs every time: a found one stays found, and a busy machine fails nothing.
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run every case of every product")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from tests.workers import ByCost

    return ByCost(config, log) if config.getoption("dist") == "loadfile" else None


def seed_all() -> None:
    """What draws without a generator of its own draws the same whatever ran before."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # Before the fixtures of a whole module, which are made with the first test that asks for them.
    seed_all()


@pytest.fixture(autouse=True)
def _seeded():
    """Whether a test made such a fixture, or found it, does not matter to what it draws."""
    seed_all()


@pytest.fixture(scope="session", autouse=True)
def _kept_registry():
    """torch's table of ONNX operators, a second of work, is made once a process and copied for each export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make, made = ONNXRegistry.from_torchlib.__func__, {}

    def kept(cls, **version):
        key = tuple(version.values())
        if key not in made:
            made[key] = make(cls, **version)
        found = copy.copy(made[key])
        found.functions = {name: list(functions) for name, functions in found.functions.items()}
        return found

    ONNXRegistry.from_torchlib = classmethod(kept)
    yield
    ONNXRegistry.from_torchlib = classmethod(make)


def pytest_collection_finish(session):
    # A million objects of imports, which every full collection would go through; an export makes as many again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_configure(config):
    end_quickly()
    config.pluginmanager.register(Share())
    config.pluginmanager.register(Budget(config))
