"""A projection whose input columns may go (heads, neurons), and how far the model moves when they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from compressft.model.costs import monotone
from compressft.passes.shared.obs import refit, removal
from compressft.transform import without_labels

# Sizes per part at which the whole model is run.
POINTS = 5


class Prunable:
    """A linear layer or Conv1D whose input columns come in groups of `size` adjacent ones.

    Args:
        moment: E[x x^T] of its inputs, (in, in).
        mean: E[x], (in,). Where the layer has a bias, the bias takes over what is constant, and only deviations from
            the mean count as loss.
        damping: added to the moment's diagonal, relative to its mean.
    """

    def __init__(self, module: nn.Module, size: int, moment: Tensor, mean: Tensor, damping: float) -> None:
        self.module = module
        self.size = size
        self.before = self._weight.double().cpu()
        self.bias = module.bias.detach().double().cpu() if isinstance(module.bias, nn.Parameter) else None
        self.mean = mean.double().cpu()
        moment = moment.double().cpu()
        if self.bias is not None:
            moment = moment - torch.outer(self.mean, self.mean)
        # Inputs that never vary have no scale of their own.
        scale = float(moment.diagonal().mean())
        scale = scale if scale > 0 else 1.0
        self.moment = moment + damping * scale * torch.eye(len(moment), dtype=moment.dtype)

    @property
    def groups(self) -> int:
        """How many there are."""
        return self.before.shape[1] // self.size

    @property
    def _weight(self) -> Tensor:
        """(out, in), a view of the parameter's values."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight.data.t() if type(self.module).__name__ == "Conv1D" else weight.data

    def removal(self) -> tuple[list[int], list[float]]:
        """Groups in the order in which they go, and the relative loss after 0, 1, ... of them: `obs.removal`."""
        return removal(self.before, self.moment, self.size)

    @torch.no_grad()
    def keep(self, groups: Sequence[int]) -> None:
        """Give the layer its best weights with these groups (ascending) alone; the other columns become 0."""
        columns = (torch.tensor(groups, dtype=torch.int64)[:, None] * self.size + torch.arange(self.size)).flatten()
        new = torch.zeros_like(self.before)
        if len(columns) == self.before.shape[1]:
            new = self.before
        elif len(columns):
            new[:, columns] = refit(self.before, self.moment, columns)
        self._weight.copy_(new)
        if self.bias is not None:
            self.module.bias.copy_(self.bias + (self.before - new) @ self.mean)  # type: ignore[operator, union-attr]


def model_losses(
    part: Prunable, order: Sequence[int], errors: Sequence[float], sizes: Sequence[int], shift: Callable[[], float]
) -> dict[int, float]:
    """{size: how far the whole model moves when only this part shrinks to it}, never falling towards small sizes.

    The model runs at up to `POINTS` of the sizes, dense where they are small; between them its movement is taken as
    linear in the part's own error, whose whole curve is known.

    Args:
        order, errors: of `Prunable.removal`.
        sizes: ascending, the last one is the full size.
        shift: measures the movement.
    """
    smaller = list(sizes[:-1])
    last = len(smaller) - 1
    places = sorted({round(last * (i / max(POINTS - 1, 1)) ** 2) for i in range(POINTS)}) if smaller else []
    seen = [(0.0, 0.0)]
    for place in reversed(places):
        gone = len(order) - smaller[place]
        part.keep(sorted(order[gone:]))
        seen.append((errors[gone], shift()))
    part.keep(range(len(order)))
    known = [error for error, _ in seen]
    moved = monotone([value for _, value in seen])
    return {size: float(np.interp(errors[len(order) - size], known, moved)) for size in sizes}


class Shift:
    """How far a model's last hidden states are from where they were when this was made.

    Calling it gives the mean over the dimensions of the squared distance relative to the dimension's variance, over
    all tokens that are no padding.

    Args:
        layers: the model's, in the order in which they run. With them a call may name the first one that has changed:
            those before it give what they gave, without computing it again.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], layers: Sequence[nn.Module] = ()
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.layers = layers
        self.batches = [{k: v.to(device) for k, v in without_labels(batch).items()} for batch in batches]
        # By batch, what every layer gave.
        self.outputs: list[list[object]] = []
        found = []
        for batch in self.batches:
            with _recorded(layers) as outputs:
                found.append(self._states(batch))
            self.outputs.append(outputs)
        self.want = torch.cat(found)
        self.variance = self.want.var(0).clamp(min=1e-12)

    def __call__(self, first: int = 0) -> float:
        found = []
        for batch, outputs in zip(self.batches, self.outputs, strict=True):
            with _replayed(self.layers[:first], outputs):
                found.append(self._states(batch))
        return float(((torch.cat(found) - self.want).square().mean(0) / self.variance).mean())

    @torch.no_grad()
    def _states(self, batch: Mapping[str, Tensor]) -> Tensor:
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            states = self.model(**batch, output_hidden_states=True).hidden_states[-1]
            return states[batch["attention_mask"].bool()].float()
        finally:
            for module, mode in training.items():
                module.training = mode


@contextmanager
def _recorded(layers: Sequence[nn.Module]) -> Iterator[list[object]]:
    """Inside, what the layers give is collected in the order in which they run."""
    outputs: list[object] = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output: outputs.append(output)) for layer in layers
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replayed(layers: Sequence[nn.Module], outputs: Sequence[object]) -> Iterator[None]:
    """Inside, each layer gives its recorded output and computes nothing."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer, output in zip(layers, outputs, strict=False):
        layer.__dict__["forward"] = lambda *arguments, _output=output, **options: _output
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


@contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """Inside, the layer hands on what it is given."""

    def hook(module: nn.Module, arguments: tuple[object, ...], output: object) -> object:
        return (arguments[0], *output[1:]) if isinstance(output, tuple) else arguments[0]

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
