"""Environment: versions, device, precision and kernels, one line each, as this machine has them."""

import platform
from importlib.metadata import version

import torch

from compressft.run.environment import lines
from compressft.utils.machine import usable_cores


def found() -> dict[str, str]:
    pairs = [line.split(maxsplit=1) for line in lines()]
    return {name: value.strip() for name, value in pairs}


def test_lines_say_what_is_installed():
    said = found()
    assert said["python"] == platform.python_version()
    for package in ("torch", "transformers", "onnxruntime"):
        assert said[package] == version(package)
    assert said["cores"] == str(usable_cores())
    assert len(said) == len(lines())
    assert all("\n" not in line for line in lines())


def test_device_precision_and_kernels_are_named():
    said = found()
    assert said["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    precision, _, reason = said["precision"].partition(" ")
    assert precision in ("bfloat16", "float16", "float32")
    assert reason
    assert "adapter" in said["kernels"]
