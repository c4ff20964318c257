"""Timing, size and memory: used by export, report and every benchmark. Each model is timed in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from typing import TypedDict

from compressft.evaluation.inputs import empty_past, sample_inputs
from compressft.utils.collector import end_quickly, importing
from compressft.utils.machine import default_threads
from compressft.utils.waiting import as_found

Shape = tuple[int, int]
# Asks a process for its samples: (shape, milliseconds of single calls) of each shape.
Turn = Callable[[], list[tuple[Shape, list[float]]]]


class Latency(TypedDict):
    """A row of report.json's `latency_ms`; milliseconds of one call."""

    runtime: str
    model: str
    batch: int
    length: int
    p50: float
    p90: float
    threads: int


# A call that takes this long has nothing to warm up that a second one would need.
WARM = 0.25


def timed(call: Callable[[], object], warmup: int = 5, least: int = 10, budget: float = 1.0) -> list[float]:
    """Milliseconds of single calls: at least `least` and up to `budget` seconds.

    Args:
        warmup: untimed calls before; no more once they have taken `WARM` seconds.
    """
    warm = time.perf_counter() + WARM
    for _ in range(warmup):
        call()
        if time.perf_counter() > warm:
            break
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p50 and p90."""
    import numpy as np

    p50, p90 = np.percentile(samples, [50, 90])
    return {"p50": float(p50), "p90": float(p90)}


def latencies(
    models: Mapping[tuple[str, str], Path], shapes: Sequence[Shape], threads: int | None = None, rounds: int = 3
) -> list[Latency]:
    """Latency rows of report.json.

    Args:
        models: (runtime, name) -> path; runtime "onnxruntime" takes a file, "torch" a `model/` folder.
        shapes: (batch, length) pairs.
        threads: None: `default_threads`.
        rounds: the processes take turns this many times; of each model and shape the quietest round (least median) is
            reported, because what else a machine does can only slow a call down.

    Raises:
        RuntimeError: a model does not run; with the end of what its process wrote.
    """
    # The measured processes do without it.
    from compressft.utils.phases import steps

    threads = threads or default_threads()
    quietest: dict[tuple[str, str, Shape], dict[str, float]] = {}
    with ExitStack() as stack:
        # Each waits, asleep, while the others have their turn: starting one takes longer than its turns.
        running: dict[tuple[str, str], Turn] = {}
        for (runtime, name), path in steps(list(models.items()) * rounds, "measuring latency"):
            if (runtime, name) not in running:
                running[runtime, name] = stack.enter_context(_measured(runtime, path, threads, shapes))
            for shape, samples in running[runtime, name]():
                key, found = (runtime, name, shape), quantiles(samples)
                if key not in quietest or found["p50"] < quietest[key]["p50"]:
                    quietest[key] = found
    return [
        {
            "runtime": runtime,
            "model": name,
            "batch": shape[0],
            "length": shape[1],
            "p50": found["p50"],
            "p90": found["p90"],
            "threads": threads,
        }
        for (runtime, name, shape), found in quietest.items()
    ]


@contextmanager
def _measured(runtime: str, path: Path, threads: int, shapes: Sequence[Shape]) -> Iterator[Turn]:
    """A process that times one model whenever it is asked to: calls give [shape, milliseconds of single calls] each.

    A call raises RuntimeError where the process has failed.
    """
    command = [sys.executable, "-m", "compressft.export.measure", runtime, str(path), str(threads), json.dumps(shapes)]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=said, env=child_environment(), text=True, bufsize=1
        ) as process,
    ):

        def turn() -> list[tuple[Shape, list[float]]]:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write("\n")
            answer = process.stdout.readline()
            if not answer:
                process.wait()
                said.seek(0)
                raise RuntimeError(f"measuring {path} failed:\n{said.read()[-2000:]}")
            return [((batch, length), samples) for (batch, length), samples in json.loads(answer)]

        try:
            yield turn
        except BaseException:
            # It would go on with what it was asked; and closing its input must not hide why.
            process.kill()
            with suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            raise


def child_environment() -> dict[str, str]:
    # The child must find the same compressft, also from a source tree that is not installed.
    paths = [p for p in sys.path if p]
    return {**as_found(os.environ), "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}


def table_rows(path: str | Path) -> int:
    """Rows of the smallest table that an ONNX file looks `input_ids` up in; 400 where it shows none."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    ids, found = {"input_ids"}, []
    for node in graph.node:
        if node.op_type in ("Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze") and node.input[0] in ids:
            ids.update(node.output)
        elif node.op_type.startswith("Gather") and node.input[1] in ids and node.input[0] in sizes:
            found.append(sizes[node.input[0]])
    return min(found, default=400)


def _onnx_calls(path: str, threads: int) -> Callable[[int, int], Callable[[], object]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, pieces = session.get_inputs(), table_rows(path)

    def build(batch: int, length: int) -> Callable[[], object]:
        feed = sample_inputs([value.name for value in inputs], batch, length, pieces) | empty_past(inputs, batch)
        return lambda: session.run(None, feed)

    return build


def _torch_calls(path: str, threads: int) -> Callable[[int, int], Callable[[], object]]:
    with importing():
        import torch

        from compressft.model.saved.compressed import load_compressed

    torch.set_num_threads(threads)
    model = load_compressed(path)
    pieces = model.get_input_embeddings().num_embeddings

    def build(batch: int, length: int) -> Callable[[], object]:
        feed = {
            k: torch.from_numpy(v)
            for k, v in sample_inputs(["input_ids", "attention_mask"], batch, length, pieces).items()
        }

        def call() -> object:
            with torch.inference_mode():
                return model(**feed)

        return call

    return build


def _child() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runtime", choices=("onnxruntime", "torch"))
    parser.add_argument("path")
    parser.add_argument("threads", type=int)
    parser.add_argument("shapes", type=json.loads)
    arguments = parser.parse_args()
    calls = {"onnxruntime": _onnx_calls, "torch": _torch_calls}[arguments.runtime](arguments.path, arguments.threads)
    for _ in sys.stdin:
        print(json.dumps([[shape, timed(calls(*shape))] for shape in arguments.shapes]), flush=True)


if __name__ == "__main__":
    end_quickly()
    _child()
