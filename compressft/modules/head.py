"""ProbeHead: what a probe trains between a frozen backbone and the model's own head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressft.modules.dtypes import like
from compressft.modules.kinds import built, known
from compressft.modules.tap import Tap
from compressft.utils.texts import JSON

Body = Literal["linear", "mlp", "bilstm"]
Pooling = Literal["own", "mean"]


class BiLSTM(nn.Module):
    """One LSTM layer in each direction over a row's real tokens: (B, T, d) -> (B, T, 2 * size), 0 at paddings.

    Paddings, on either side, are never read (Hochreiter & Schmidhuber 1997; Schuster & Paliwal 1997). Computed in fp32.
    Exported as ONNX's own LSTM, which takes each row's length.
    """

    def __init__(self, width: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.size = size
        with torch.device("meta"):
            self.forwards = nn.LSTM(width, size, batch_first=True)
            self.backwards = nn.LSTM(width, size, batch_first=True)
        for lstm in (self.forwards, self.backwards):
            lstm.to_empty(device="cpu")
            for parameter in lstm.parameters():
                nn.init.uniform_(parameter, -(size**-0.5), size**-0.5, generator=generator)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` (B, T): 1 for real tokens, which stand side by side."""
        places = torch.arange(x.shape[1], device=x.device)[None, :]
        real = mask.to(torch.int64)
        length, start = real.sum(1, keepdim=True), real.argmax(1, keepdim=True)
        # Real tokens first; paddings, wherever they were, behind them.
        there, back = _wrapped(places + start, x.shape[1]), _wrapped(places - start, x.shape[1])
        if torch.compiler.is_exporting():
            y = self._exported(_gather(x.float(), there), length)
        else:
            reverse = _wrapped(length - 1 - places, x.shape[1])
            with torch.autocast(x.device.type, enabled=False):
                inputs = _gather(x.float(), there)
                y = torch.cat(
                    [self.forwards(inputs)[0], _gather(self.backwards(_gather(inputs, reverse))[0], reverse)], -1
                )
        return _gather(y, back) * real[..., None].to(y.dtype)

    def _exported(self, x: Tensor, length: Tensor) -> Tensor:
        """The same as one LSTM node; only meaningful while exporting."""
        lstms = (self.forwards, self.backwards)
        weights = torch.stack([_gates(lstm.weight_ih_l0) for lstm in lstms])
        recurrent = torch.stack([_gates(lstm.weight_hh_l0) for lstm in lstms])
        biases = torch.stack([torch.cat([_gates(lstm.bias_ih_l0), _gates(lstm.bias_hh_l0)]) for lstm in lstms])
        y = torch.onnx.ops.symbolic(
            "LSTM",
            [x.transpose(0, 1), weights, recurrent, biases, length.flatten().to(torch.int32)],
            {"hidden_size": self.size, "direction": "bidirectional"},
            dtype=x.dtype,
            shape=(x.shape[1], 2, x.shape[0], self.size),
            version=18,
        )
        return y.permute(2, 0, 1, 3).flatten(2)


def _wrapped(places: Tensor, size: int) -> Tensor:
    """Modulo `size`, of places from -size to 2 * size - 1; the exporter has no modulo of a dynamic size."""
    places = torch.where(places < 0, places + size, places)
    return torch.where(places >= size, places - size, places)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """Tokens of x (B, T, d) in the order of `places` (B, T)."""
    return torch.gather(x, 1, places[..., None].expand(-1, -1, x.shape[2]))


def _gates(parameter: Tensor | nn.Module) -> Tensor:
    """torch's order of an LSTM's gates, input, forget, cell, output, as ONNX's: input, output, forget, cell."""
    assert isinstance(parameter, Tensor)
    return parameter.unflatten(0, (4, -1))[[0, 3, 1, 2]].flatten(0, 1)


@dataclass(frozen=True)
class HeadDesign:
    """What a `ProbeHead` is made of: d, `body` with its `size`, and how features are read."""

    width: int
    body: Body
    size: int
    standardise: bool
    pooling: Pooling = "own"


@known
class ProbeHead(Tap):
    """Features (B, T, d) -> (B, T, d) for the model's own head: standardised, then through `body`.

    `body`: "linear" nothing; "mlp" Linear - gelu - Linear, `size` wide inside; "bilstm" a `BiLSTM` of `size` in each
    direction, mapped back to d where 2 * size is another. Buffers `mean` and `deviation` (d,), with `standardise`.
    `pooling` "mean": every token is given the mean over the row's real ones, of the features, or of the LSTM's outputs.
    """

    kind: ClassVar[str] = "probe_head"
    above_norm = True
    wants = ("attention_mask",)
    mean: Tensor
    deviation: Tensor

    def __init__(self, design: HeadDesign, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.design = design
        self.body, self.standardise, self.pooling = design.body, design.standardise, design.pooling
        width, size = design.width, design.size
        generator = generator or torch.Generator().manual_seed(0)
        if design.standardise:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("deviation", torch.ones(width))
        if design.body == "mlp":
            self.inner, self.outer = _linear(width, size, generator), _linear(size, width, generator)
        elif design.body == "bilstm":
            self.lstm = BiLSTM(width, size, generator)
            self.outer = None if 2 * size == width else _linear(2 * size, width, generator)

    def describe(self) -> dict[str, JSON]:
        return asdict(self.design)

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> ProbeHead:
        return cls(built(HeadDesign, entry))

    @property
    def pools_features(self) -> bool:
        """Whether the mean is taken before anything else."""
        return self.pooling == "mean" and self.body != "bilstm"

    def top(self, states: list[Tensor], last: Tensor, inputs: Mapping[str, object]) -> Tensor:
        return self(last, inputs["attention_mask"])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, T) marks paddings with 0; None: there are none."""
        y = mean_of_tokens(x, mask) if self.pools_features else x
        if self.standardise:
            y = (y - self.mean) / self.deviation
        if self.body == "mlp":
            (y,) = like(self.inner.weight, y)
            y = self.outer(F.gelu(self.inner(y)))  # type: ignore[misc]
        elif self.body == "bilstm":
            real = torch.ones_like(x[..., 0], dtype=torch.int64) if mask is None else mask
            y = self.lstm(y, real)
            if self.pooling == "mean":
                y = mean_of_tokens(y, mask)
            y = y if self.outer is None else self.outer(y)
        return like(x, y)[0].expand_as(x)


def mean_of_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, d) -> (B, 1, d), over the tokens that `mask` (B, T) does not mark with 0."""
    if mask is None:
        return x.mean(1, keepdim=True)
    real = mask[..., None].to(x.dtype)
    return (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def _linear(width: int, out: int, generator: torch.Generator) -> nn.Linear:
    with torch.device("meta"):
        new = nn.Linear(width, out)
    new.to_empty(device="cpu")
    nn.init.uniform_(new.weight, -(width**-0.5), width**-0.5, generator=generator)
    nn.init.zeros_(new.bias)
    return new
