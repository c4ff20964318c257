"""Codes of a matrix of differences: exact, its largest entries, of low rank, one bit or one byte an entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from compressft_kernels import pack_mask, unpack_mask
from torch import Tensor

from compressft.errors import UserError
from compressft.model.saved.factors import multiply, nearest
from compressft.model.saved.sparse import pack_places, unpack_places
from compressft.modules.rank import keep_largest

Kind = Literal["exact", "magnitude", "low_rank", "sign", "int8"]


@dataclass(frozen=True)
class Code:
    """How matrices are coded: `kind`, with `density` for magnitude and `rank` for low_rank.

    - exact: as it is.
    - magnitude: the round(density * N) largest entries of each matrix, to the bit, and where they are.
    - low_rank: the nearest matrix of this rank (`saved.factors`), two factors of (out + in) * rank values.
    - sign: +s or -s by the entry's sign, s the mean |entry| of its row: one bit an entry and a value a row.
    - int8: integers times a row's max |entry| / 127: one byte an entry and a value a row.

    Raises:
        UserError: density or rank where the kind has none, none where it needs one, or one out of range.
    """

    kind: Kind = "exact"
    density: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (("density", "magnitude"), ("rank", "low_rank")):
            given = getattr(self, name) is not None
            if given != (self.kind == kind):
                verb = "belongs to" if given else "is wanted for"
                raise UserError(f"{name}: {verb} encoding {kind!r}; this is {self.kind!r}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density: {self.density} is not in (0, 1]")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank: {self.rank} is less than 1")


@torch.no_grad()
def encode(difference: Tensor, code: Code) -> dict[str, Tensor]:
    """The parts that stand for a difference, fp32; what is no matrix is kept exactly, whatever the code.

    Args:
        difference: (rows, columns); rows are output features where it is a linear layer's.
    """
    if code.kind == "exact" or difference.dim() != 2:
        return {"exact": difference.clone()}
    difference = difference.float()
    if code.kind == "magnitude":
        assert code.density is not None
        mask = keep_largest([difference.abs()], round(code.density * difference.numel()))[0]
        shape = torch.tensor(difference.shape)
        return {"places": pack_places(mask), "values": difference[mask], "shape": shape}
    if code.kind == "low_rank":
        assert code.rank is not None
        left, right = nearest(difference, code.rank)
        return {"left": left, "right": right}
    if code.kind == "sign":
        scale = difference.abs().mean(1)
        return {"sign": pack_mask(difference > 0), "scale": scale, "shape": torch.tensor(difference.shape)}
    scale = difference.abs().amax(1) / 127.0
    steps = difference / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return {"int8": steps.round().clamp(-127, 127).to(torch.int8), "scale": scale}


def shape_of(parts: Mapping[str, Tensor]) -> torch.Size:
    """Of the difference that the parts stand for, without decoding it.

    Raises:
        KeyError, IndexError, TypeError: they are no code.
    """
    if "exact" in parts or "int8" in parts:
        return parts["exact" if "exact" in parts else "int8"].shape
    if "left" in parts:
        return torch.Size((parts["left"].shape[0], parts["right"].shape[1]))
    return torch.Size(parts["shape"].tolist())


@torch.no_grad()
def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """The difference that the parts stand for; the same bits on every machine."""
    if "exact" in parts:
        return parts["exact"].clone()
    if "places" in parts:
        mask = unpack_places(parts["places"], torch.Size(parts["shape"].tolist()))
        out = torch.zeros(mask.shape, device=mask.device)
        out[mask] = parts["values"]
        return out
    if "left" in parts:
        return multiply(parts["left"], parts["right"])
    scale = parts["scale"][:, None]
    if "sign" in parts:
        return torch.where(unpack_mask(parts["sign"], int(parts["shape"][1])), scale, -scale)
    return parts["int8"] * scale
