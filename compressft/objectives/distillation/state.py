"""What distillation puts into the student while it trains: projections, the phase, and the recording of attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compressft.modules.attention import Attended, Recorder, recording

NAME = "distillation"
SHARED = "shared"


class Recorded(Protocol):
    """A student's outputs, where `Distillation.record` puts what its attention was given."""

    attended: Mapping[int, Attended]


class Projection(nn.Module):
    """x W^T + b from the student's to the teacher's width (Jiao et al. 2020, equation 8, W_h); drawn from N(0, 1/d)."""

    def __init__(self, width: int, teacher_width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(teacher_width, width, generator=generator) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(teacher_width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., teacher_width)."""
        return F.linear(x, self.weight, self.bias)


class Distillation(nn.Module):
    """Sits in the student as `distillation` from prepare to finalize, so optimiser and checkpoint see its parameters.

    Parameters: `projections`, one for all layers or one per student layer, none where the widths are equal.
    Attributes: `pairs` the fixed layer map, None where it is learned; `relation_pairs` and `relation_heads`; `depths`
    of student and teacher; `asked` the teacher's attention modules that are recorded; `intermediate` and `prediction`
    say which of the two kinds of terms are in force now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict()
        self.pairs: tuple[tuple[int, int], ...] | None = None
        self.relation_pairs: tuple[tuple[int, int], ...] = ()
        self.relation_heads = 0
        self.depths: tuple[int, int] = (0, 0)
        self.intermediate = True
        self.prediction = True
        self.asked: dict[nn.Module, int] = {}
        self._hooks: list[RemovableHandle] = []
        self._open: list[tuple[AbstractContextManager[None], Recorder]] = []

    @classmethod
    def of(cls, model: nn.Module) -> Distillation:
        """The student's own."""
        state = getattr(model, NAME)
        assert isinstance(state, cls)
        return state

    def project(self, layer: int, hidden: Tensor) -> Tensor:
        """A student layer's states in the teacher's width."""
        if not len(self.projections):
            return hidden
        return self.projections[SHARED if SHARED in self.projections else str(layer)](hidden)

    def widen(self, kind: str, layers: Iterable[int], widths: tuple[int, int], seed: int, device: torch.device) -> None:
        """Add the projections: "shared" one for all layers, "pair" one for each of `layers`, "none" nothing."""
        names = {"shared": [SHARED], "pair": [str(layer) for layer in layers], "none": []}[kind]
        generator = torch.Generator().manual_seed(seed)
        for name in names:
            self.projections[name] = Projection(*widths, generator).to(device)

    def record(self, model: nn.Module, modules: Mapping[nn.Module, int]) -> None:
        """From now on a forward of the student that keeps a graph puts what attention was given into its outputs.

        Outputs get an attribute `attended`: layer -> Attended. Nothing is kept in evaluation, nor when the terms that
        want it are not in force.
        """

        def before(module: nn.Module, arguments: object) -> None:
            if torch.is_grad_enabled() and self.intermediate:
                recorder = Recorder(modules)
                context = recording(recorder)
                context.__enter__()
                self._open.append((context, recorder))

        def after(module: nn.Module, arguments: object, outputs: Recorded | None) -> None:
            if torch.is_grad_enabled() and self._open:
                context, recorder = self._open.pop()
                context.__exit__(None, None, None)
                if outputs is not None:
                    outputs.attended = recorder.taken

        self._hooks = [
            model.register_forward_pre_hook(before),
            # Also after an error, which must not leave the recording open.
            model.register_forward_hook(after, always_call=True),
        ]

    def remove(self, model: nn.Module) -> None:
        """Leave the student."""
        for hook in self._hooks:
            hook.remove()
        delattr(model, NAME)
