"""Milliseconds of one trained int8 model whose weights are written in each of the ways that could be shipped."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressft.evaluation.logits import open_session
from compressft.export.fold import fold
from compressft.export.fuse import fuse_qattention
from compressft.export.measure import latencies
from compressft.export.onnx import save, to_graph
from compressft.model.saved.compressed import load_compressed
from compressft.modules.quantizer import Int8Quantizer

SHAPES = ((1, 32), (1, 128), (8, 128))
WRITTEN = {
    "8 bits": {"target": "vnni", "weight_bits": 8},
    "portable": {"target": "any", "weight_bits": 8},
    "7 bits": {"target": "any", "weight_bits": 7},
}
# Inputs of each operator: its weight and that weight's zero point.
WEIGHTS = {"QAttention": (1, 7), "MatMulIntegerToFloat": (1, 5)}


def speed(folder: Path, rounds: int = 3) -> list[dict[str, Any]]:
    """Rows {"weights", "exact", "ms": {shape: p50}} of a `model/` folder with static int8 layers."""
    model = load_compressed(folder)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{number}.onnx" for number, name in enumerate([*WRITTEN, "unsigned"])}
        for name, fields in WRITTEN.items():
            for module in model.modules():
                if isinstance(module, Int8Quantizer):
                    module.target, module.weight_bits = fields["target"], fields["weight_bits"]  # type: ignore[assignment]
            ids = torch.randint(5, 400, (2, 16))
            graph = to_graph(fold(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            fuse_qattention(graph)
            save(graph, files[name])
        unsigned(files["8 bits"], files["unsigned"])
        exact = {name: _exact(file) for name, file in files.items()}
        rows = latencies({("onnxruntime", name): file for name, file in files.items()}, SHAPES, rounds=rounds)
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(row["model"], {})[f"{row['batch']}x{row['length']}"] = row["p50"]
    return [{"weights": name, "exact": exact[name], "ms": ms} for name, ms in times.items()]


def unsigned(source: Path, target: Path) -> None:
    """Shift every s8 weight by 128 to u8, its zero point with it: the same numbers, for other kernels."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(source))
    values = {one.name: one for one in model.graph.initializer}
    for number, node in enumerate(model.graph.node):
        if node.op_type in WEIGHTS:
            weight, zero = WEIGHTS[node.op_type]
            array = numpy_helper.to_array(values[node.input[weight]])
            shifted = numpy_helper.from_array((array.astype(np.int16) + 128).astype(np.uint8), f"unsigned.{number}")
            points = numpy_helper.from_array(np.full(array.shape[1], 128, np.uint8), f"unsigned.{number}.zero_point")
            model.graph.initializer.extend([shifted, points])
            node.input[weight] = shifted.name
            node.input.extend([""] * (zero + 1 - len(node.input)))
            node.input[zero] = points.name
    onnx.save(model, str(target))


def _exact(file: Path) -> bool:
    """Whether this machine's default session gives what the exact kernels give, but for single roundings."""
    ids = np.random.default_rng(0).integers(5, 400, (32, 24))
    found = []
    for exact in (False, True):
        session = open_session(file, exact=exact)
        names = {value.name for value in session.get_inputs()}
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found.append(session.run(None, {name: value for name, value in feed.items() if name in names})[0])
    return bool(np.abs(found[0] - found[1]).max() <= 0.02 * np.std(found[1]))


if __name__ == "__main__":
    import sys

    print(json.dumps(speed(Path(sys.argv[1])), indent=1))
