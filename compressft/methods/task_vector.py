"""Full fine-tuning whose result ships as the base plus a coded difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressft.methods.full import TRAINED, Full
from compressft.model.anatomy import anatomy
from compressft.model.saved.codes import Code, Kind, decode, encode
from compressft.model.surgery import head_parameters
from compressft.modules.linear import CompressedLinear
from compressft.transform import Claim, Context, Transform, trainable

# Submodule of the backbone that holds the starting weights while training runs.
ORIGIN = "task_vector_origin"


class CodedTaskVector(Transform):
    """Train like `full`; the last step ends with theta = theta0 + scaling * decode(encode(theta - theta0)).

    Pretrained matrices are coded by `encoding` (`saved.codes.Code`: "exact", "magnitude" with `density`,
    "low_rank" with `rank`, "sign", "int8"), biases and norms exactly, a new task's head not at all: it has no
    pretrained values to start from. So the evaluation after the last step, the shipped model and its file are of what
    the coded vector gives. `saved.vectors` takes the vector out of the run's `delta/` and stores it in its code.

    theta0 is held once in the host's memory, not on the device and not in checkpoints: a resumed run prepares the same
    starting model again. "exact" with scaling 1 holds nothing.
    """

    type: Literal["task_vector"] = "task_vector"
    freeze_embeddings: bool = False
    encoding: Kind = "exact"
    density: float | None = None
    rank: int | None = None
    scaling: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_code(self) -> CodedTaskVector:
        self.code  # noqa: B018
        return self

    @property
    def code(self) -> Code:
        """How matrices are coded."""
        return Code(self.encoding, self.density, self.rank)

    @property
    def _plain(self) -> bool:
        return self.encoding == "exact" and self.scaling == 1.0

    def prepare(self, model: nn.Module, context: Context) -> None:
        Full(freeze_embeddings=self.freeze_embeddings).prepare(model, context)
        if not self._plain:
            inside = f"{anatomy(model).prefix}."
            # A pooler is trained like a head, but pretrained.
            head = {name for name, _ in head_parameters(model) if not name.startswith(inside)}
            # A model without values is there to be counted.
            kept = {
                name: p.detach().cpu().clone() for name, p in trainable(model) if name not in head and not p.is_meta
            }
            anatomy(model).backbone.add_module(ORIGIN, Origin(kept).to(next(model.parameters()).device))

    def after_step(self, model: nn.Module, progress: float) -> None:
        origin = getattr(anatomy(model).backbone, ORIGIN, None)
        # The flag is state: a checkpoint of the last step is not coded a second time.
        if origin is not None and progress >= 1.0 and not int(origin.coded):
            self._settle(model, origin)

    @torch.no_grad()
    def _settle(self, model: nn.Module, origin: Origin) -> None:
        for name, old in origin.tensors.items():
            parameter = model.get_parameter(name)
            module = model.get_submodule(name.rpartition(".")[0])
            old = old.to(parameter.device)
            # (out, in), whatever the family's layout is and whether a pass has turned it.
            conv = type(module).__name__ == "Conv1D" and old.dim() == 2
            turned = isinstance(module, CompressedLinear) and module.transposed and old.dim() == 2
            old = old.t() if conv or turned else old
            new = parameter.t() if conv else parameter
            moved = decode(encode(new - old, self.code)) * self.scaling
            parameter.copy_((old + moved).t() if conv else old + moved)
        origin.coded.fill_(1)

    def finalize(self, model: nn.Module) -> None:
        backbone = anatomy(model).backbone
        origin: Origin | None = getattr(backbone, ORIGIN, None)
        if origin is not None:
            if not int(origin.coded):
                self._settle(model, origin)
            delattr(backbone, ORIGIN)

    def changes(self) -> Sequence[Claim]:
        return TRAINED


class Origin(nn.Module):
    """Starting weights by parameter name, on the host and in no checkpoint; buffer `coded` (int64): they served."""

    coded: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.register_buffer("coded", torch.zeros((), dtype=torch.int64))
