"""Timing and the description of the machine."""

import time

import numpy as np
import pytest
import torch

import compressft
from compressft.export.measure import latencies, quantiles, timed
from compressft.utils.machine import default_threads, hardware, process_age, usable_cores, versions


def test_timed_counts_and_measures():
    calls = []
    samples = timed(lambda: (calls.append(1), time.sleep(0.002)), warmup=3, least=10, budget=0.0)
    assert len(samples) == 10 and len(calls) == 13
    assert all(2.0 <= sample < 2000 for sample in samples)


def test_timed_uses_its_budget():
    samples = timed(lambda: time.sleep(0.001), warmup=0, least=1, budget=0.05)
    assert sum(samples) >= 45


@pytest.mark.parametrize(
    ("asked", "threads"), [("1", 1), ("3", 3), ("2,4", 2), (" 5 ", 5), ("", None), ("0", None), ("many", None)]
)
def test_threads_are_those_asked_for(monkeypatch, asked, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert default_threads() == (threads or usable_cores())
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == usable_cores()


def test_the_process_has_an_age():
    before = process_age()
    time.sleep(0.02)
    assert 0 < before < process_age() < before + 5


def test_quantiles():
    samples = [float(v) for v in np.random.default_rng(0).exponential(size=101)]
    ordered = sorted(samples)
    assert quantiles(samples) == {"p50": ordered[50], "p90": pytest.approx(ordered[90])}


def test_a_failed_measurement_says_which_file(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"broken\.onnx"):
        latencies({("onnxruntime", "broken"): broken}, [(1, 8)], rounds=1)


def test_machine():
    found = hardware()
    assert found["cores"] == usable_cores() >= 1
    assert found["memory_bytes"] > 2**28 and found["cpu"]
    assert ("gpu" in found) == torch.cuda.is_available()


def test_versions_are_those_installed():
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "onnxruntime"} <= set(found)
    assert found["compressft"] == compressft.__version__
