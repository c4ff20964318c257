"""Find the first layer at which the exported graph and the trained model part ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from compressft.evaluation.logits import feed, open_session
from compressft.export.onnx import module_of
from compressft.model.anatomy import anatomy

# Sees a layer's output.
Hook = Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]


def diverging_layer(
    path: Path, model: nn.Module, batch: Mapping[str, Tensor], limit: float = 0.05, exact: bool = False
) -> str:
    """Run one batch through both with every layer's output exposed.

    Args:
        exact: as in `open_session`.
        limit: relative error (of the layer output's standard deviation) from which a layer counts as diverged.

    Returns:
        a sentence naming the first layer beyond the limit and its error, or saying that only the head differs.
    """
    layers = anatomy(model).layers
    expected: dict[str, np.ndarray] = {}
    hooks = [layer.module.register_forward_hook(_keeper(expected, layer.name)) for layer in layers]
    try:
        with torch.no_grad():
            model.eval()(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    actual = _layer_outputs(path, [layer.name for layer in layers], batch, exact)
    for layer in layers:
        if layer.name not in actual:
            return f"layer {layer.name} has no node of its own in the graph"
        got = actual[layer.name]
        # A file may compute its last layer for the first token alone.
        want = expected[layer.name][:, : got.shape[1]]
        error = float(np.abs(want - got).max() / max(float(want.std()), 1e-12))
        if not error <= limit:
            return (
                f"the first layer that diverges is {layer.name} (largest error {error:.3g} of its standard deviation)"
            )
    return f"all {len(layers)} layers agree within {limit} of their standard deviation; the head after them differs"


def _keeper(
    store: dict[str, np.ndarray], name: str
) -> Callable[[nn.Module, object, Tensor | tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        store[name] = (output[0] if isinstance(output, tuple) else output).float().cpu().numpy()

    return hook


def _layer_outputs(path: Path, names: list[str], batch: Mapping[str, Tensor], exact: bool) -> dict[str, np.ndarray]:
    import onnx

    model = onnx.load(str(path))
    last: dict[str, str] = {}
    for node in model.graph.node:
        module = f"{module_of(node.name)}."
        for name in names:
            if module.startswith(f"{name}."):
                last[name] = node.output[0]
    for output in last.values():
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = open_session(model.SerializeToString(), exact=exact)
    results = session.run(list(last.values()), feed(session, batch))
    return {name: np.asarray(value) for name, value in zip(last, results, strict=True)}
