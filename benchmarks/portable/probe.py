"""A one-node file that tells how a machine adds u8 x s8 products; see `score.saturates`."""

from __future__ import annotations

from pathlib import Path

WIDTH = 64


def write_probe(path: Path) -> Path:
    """MatMulInteger of x, u8 (1, WIDTH), with a weight, s8 (WIDTH, 16), of 127 alone. Written once."""
    if path.is_file():
        return path
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((WIDTH, 16), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [1, 16])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path
