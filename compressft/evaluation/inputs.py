"""What an exported file is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from onnxruntime.capi.onnxruntime_pybind11_state import NodeArg


def sample_inputs(names: Sequence[str], batch: int, length: int, pieces: int = 400) -> dict[str, np.ndarray]:
    """Made-up rows.

    Args:
        pieces: rows of the model's table; ids are among the first 400 of them, which are frequent pieces.
    """
    import numpy as np

    ids = np.random.default_rng(0).integers(10 if pieces >= 400 else 0, min(pieces, 400), (batch, length))
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    values["position_ids"] = np.broadcast_to(np.arange(length), ids.shape)
    return {name: values[name] for name in names if name in values}


def empty_past(inputs: Sequence[NodeArg], batch: int) -> dict[str, np.ndarray]:
    """No earlier tokens, for those of a session's inputs that are a language model's cache: (batch, heads, 0, size)."""
    import numpy as np

    past = [value for value in inputs if value.name.startswith("past_key_values.")]
    return {value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32) for value in past}
