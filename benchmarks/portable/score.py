"""Compute the logits of a file: `python score.py JOB.json ANSWER.json`. Runs anywhere: numpy and onnxruntime alone.

A job is {"model", "batches": [{input name: rows}], "options": {session option: value}, "threads", "probe"}; the answer
{"onnxruntime", "logits": [a batch's, as nested lists], "saturates", "processor"}. The numbers are written exactly.
"""

from __future__ import annotations

import ctypes
import json
import platform
import sys
from typing import Any

import numpy as np
import onnxruntime

# Bits of AT_HWCAP (16) and AT_HWCAP2 (26) on arm64, of the features that onnxruntime chooses kernels by.
ARM64 = {"asimddp": (16, 20), "sve": (16, 22), "sve2": (26, 1), "i8mm": (26, 13), "bf16": (26, 14), "sme": (26, 23)}


def session(path: str, job: dict[str, Any]) -> Any:
    """As a user's program opens it, but for what the job asks."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for name, value in job["options"].items():
        options.add_session_config_entry(name, value)
    if job["threads"]:
        options.intra_op_num_threads = job["threads"]
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def logits(opened: Any, batch: dict[str, list[Any]]) -> list[Any]:
    """Of one batch; a file takes the inputs that it knows."""
    names = {value.name for value in opened.get_inputs()}
    feed = {name: np.array(rows, np.int64) for name, rows in batch.items() if name in names}
    return opened.run(["logits"], feed)[0].tolist()


def saturates(job: dict[str, Any]) -> bool:
    """Whether the kernels add pairs of u8 x s8 products in 16 bits: then the largest ones are cut."""
    opened = session(job["probe"], job)
    given = opened.get_inputs()[0]
    result = opened.run(None, {given.name: np.full(given.shape, 255, np.uint8)})[0]
    return bool((result != 255 * 127 * given.shape[1]).any())


def processor() -> list[str]:
    """What a program is told about an arm64 processor."""
    if platform.machine() != "aarch64":
        return []
    asked = ctypes.CDLL(None).getauxval
    asked.restype, asked.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return [name for name, (word, bit) in ARM64.items() if asked(word) >> bit & 1]


def main() -> None:
    """Read the job, write the answer."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    opened = session(job["model"], job)
    answer = {
        "onnxruntime": onnxruntime.__version__,
        "processor": processor(),
        "saturates": saturates(job),
        "logits": [logits(opened, batch) for batch in job["batches"]],
    }
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
