"""What `compressft env` prints."""

from __future__ import annotations

import torch

from compressft.utils.machine import hardware, versions


def lines() -> list[str]:
    """Versions, device, precision and kernels of this machine, one line each."""
    from compressft_kernels import explain
    from compressft_kernels.dispatch import OPERATIONS

    from compressft.utils.precision import autocast_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = autocast_dtype("auto", device)
    found = [f"{name:14} {value}" for name, value in versions().items()]
    found += [f"{name:14} {value}" for name, value in hardware().items()]
    found.append(f"{'device':14} {device}")
    reason = "the hardware multiplies it" if dtype is not None else "the hardware does not multiply bf16"
    found.append(f"{'precision':14} {str(dtype or torch.float32).removeprefix('torch.')} ({reason})")
    paths: dict[str, list[str]] = {}
    for operation in OPERATIONS:
        _, _, path = explain(operation, device=device, dtype=dtype or torch.float32).partition(": ")
        paths.setdefault(path, []).append(operation)
    said = "; ".join(f"{', '.join(operations)}: {path}" for path, operations in paths.items())
    return [*found, f"{'kernels':14} {said}"]
