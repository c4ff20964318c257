"""What flows into a model's linear layers: moments of their inputs over a calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressft.utils.phases import steps


def second_moments(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """E[x x^T] of the inputs of these modules: `moments` without the means."""
    return moments(model, paths, batches)[0]


@torch.no_grad()
def moments(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[x x^T] and E[x] of the inputs of these modules, the means over all tokens that are no padding.

    The model runs in eval mode as it is now (its gates, adapters and quantizers act) and only as far as the last of
    the modules; what it was before, it is afterwards.

    Args:
        paths: modules that take (batch, tokens, in), or (batch, in) where one vector per row counts.
        batches: as the model takes them, on any device; `attention_mask` (batch, tokens) marks paddings with 0.

    Returns:
        path -> (in, in) fp32, symmetric, and path -> (in,) fp32, on the model's device. A column without any signal
        has zeros.

    Raises:
        ValueError: no batches, or a module that the model does not run through.
    """
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(paths, 0.0)
    device = next(model.parameters()).device
    with _quiet(model):
        for batch in steps(batches, "looking at what flows into the layers"):
            batch = {name: value.to(device) for name, value in batch.items()}
            for path, x in _inputs(model, paths, batch).items():
                rows = _tokens(x, batch.get("attention_mask"))
                product, total = rows.t() @ rows, rows.sum(0)
                squares[path] = squares[path] + product if path in squares else product
                sums[path] = sums[path] + total if path in sums else total
                counts[path] += len(rows)
    missing = [path for path in paths if not counts[path]]
    if missing:
        raise ValueError(f"moments: {missing[0]!r} saw no input in {len(batches)} batches")
    return (
        {path: squares[path] / counts[path] for path in paths},
        {path: sums[path] / counts[path] for path in paths},
    )


class _Enough(Exception):
    """Every module asked for has been seen: the rest of the forward is not needed."""


def _inputs(model: nn.Module, paths: Sequence[str], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Path -> the input of that module in one forward pass."""
    seen: dict[str, Tensor] = {}

    def remember(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[path] = arguments[0]
            if len(seen) == len(set(paths)):
                raise _Enough

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(remember(path)) for path in paths]
    try:
        model(**batch)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, in) fp32: the vectors that count."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.bool()].float()
    return x.reshape(-1, x.shape[-1]).float()


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, nothing observed), then every module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
