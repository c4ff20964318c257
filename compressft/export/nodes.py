"""What a node of a graph has where its operator says that it must be there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def given(node: ir.Node, position: int) -> ir.Value:
    """An input that is not left out."""
    value = node.inputs[position]
    assert value is not None
    return value


def array_of(value: ir.Value) -> np.ndarray:
    """An initialiser's values."""
    assert value.const_value is not None
    return value.const_value.numpy()


def name_of(value: ir.Value) -> str:
    """A value's name; those of a finished graph have one."""
    assert value.name is not None
    return value.name


def shape_of(value: ir.Value) -> ir.Shape:
    """A shape that the exporter has worked out."""
    assert value.shape is not None
    return value.shape
