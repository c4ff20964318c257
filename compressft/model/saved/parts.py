"""What the parts of a packed tensor must be before anything is made of them: files may come from anybody.

The forms are those of `saved.sparse`. Checking allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from compressft.errors import UserError

VALUES, SHAPE, DROPPED, CHANGED, ROWS, COLUMNS = "#values", "#shape", "#dropped", "#changed", "#rows", "#columns"
SIGNS, STEPS, SCALE = "#signs", "#steps", "#scale"
LEFT, RIGHT, NUDGED = "#left", "#right", "#nudged"
# The highest code says: this many places on, and nothing is here.
ESCAPES = {torch.uint8: 255, torch.uint16: 65535}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16)
# Entries of a tensor of which neither a reader nor the base says how large it may be.
MOST = 2**24


@dataclass(frozen=True)
class Packed:
    """One packed tensor.

    Attributes:
        parts: by suffix.
        old: the base's tensor of its name.
        wanted: the shape that a reader needs; None where that is not known.
    """

    parts: Mapping[str, Tensor]
    old: Tensor | None
    wanted: torch.Size | None

    @property
    def shape(self) -> torch.Size:
        """What the parts say, checked to be a shape of two dimensions."""
        said = self.parts[SHAPE]
        if said.dtype not in INTEGERS or said.shape != (2,) or min(said.tolist()) < 0:
            refuse(f"{SHAPE} is no shape of rows and columns")
        return torch.Size(said.tolist())


def refuse(why: str) -> NoReturn:
    """UserError without a name or fix, which the reader of the file adds."""
    raise UserError(why)


def check_parts(packed: Packed) -> None:
    """Refuse parts that are no form, do not belong together, or make another tensor than is needed.

    How many places a mask has is for whoever unpacks it to count.

    Raises:
        UserError: what is wrong, without the tensor's name.
    """
    present = set(packed.parts)
    if present & {VALUES, SHAPE, "#bits", "#gaps"}:
        _all_of(present, {VALUES, SHAPE, _places(present, "#")})
        _is_list(packed, VALUES)
        if packed.parts[VALUES].dtype not in FLOATS:
            refuse(f"{VALUES} are {packed.parts[VALUES].dtype}, no floats")
        _fits(packed, packed.shape)
        _check_places(packed, "#", packed.shape)
        return
    old = packed.old
    if old is None or old.dim() != 2:
        refuse("is stored as a change of a matrix of the base, which has none of this name")
    for suffix, dim in ((ROWS, 0), (COLUMNS, 1)):
        if suffix in present:
            _all_of(present, {suffix})
            _check_lines(packed, suffix, dim, old)
            return
    _check_change(packed, present, old)


def _check_lines(packed: Packed, suffix: str, dim: int, old: Tensor) -> None:
    lines = packed.parts[suffix]
    _is_list(packed, suffix)
    if lines.dtype not in INTEGERS:
        refuse(f"{suffix} are {lines.dtype}, no numbers of lines")
    size = list(old.shape)
    if len(lines) and not 0 <= int(lines.min()) <= int(lines.max()) < size[dim]:
        refuse(f"{suffix} are beyond the base's {size[dim]}")
    size[dim] = len(lines)
    _fits(packed, torch.Size(size))


def _check_change(packed: Packed, present: set[str], old: Tensor) -> None:
    """Parts that make a tensor of the base's shape out of the base's."""
    _fits(packed, old.shape)
    needed: set[str] = set()
    if SCALE in present:
        needed = {SCALE, STEPS if STEPS in present else SIGNS}
    elif present & {LEFT, RIGHT}:
        needed = {LEFT, RIGHT}
    elif present & {f"{DROPPED}_bits", f"{DROPPED}_gaps"}:
        needed = {_places(present, f"{DROPPED}_")}
    for suffix in (CHANGED, NUDGED):
        if suffix in present:
            needed |= {suffix, _places(present, f"{suffix}_")}
    _all_of(present, needed)
    if SCALE in present:
        _check_scaled(packed, old)
    if LEFT in present:
        _check_factors(packed, old)
    _check_places(packed, f"{DROPPED}_", old.shape)
    for suffix, dtype, of in ((CHANGED, old.dtype, old.dtype), (NUDGED, torch.int8, torch.float32)):
        if suffix in present:
            _is_list(packed, suffix)
            if packed.parts[suffix].dtype != dtype or old.dtype != of:
                refuse(f"{suffix} are {packed.parts[suffix].dtype}, the base is {old.dtype}")
            _check_places(packed, f"{suffix}_", old.shape)


def _check_scaled(packed: Packed, old: Tensor) -> None:
    steps = STEPS if STEPS in packed.parts else SIGNS
    scale, integers = packed.parts[SCALE], packed.parts[steps]
    rows, columns = old.shape
    wanted = (torch.int8, (rows, columns)) if steps == STEPS else (torch.uint8, (rows, _bytes(columns)))
    if old.dtype != torch.float32 or scale.dtype != torch.float32 or (integers.dtype, tuple(integers.shape)) != wanted:
        refuse(f"{SCALE} and {steps} do not fit the base's {tuple(old.shape)} {old.dtype}")
    if tuple(scale.shape) not in ((rows, 1), (1, columns)):
        refuse(f"{SCALE} of {tuple(scale.shape)} is none for each row or column of {tuple(old.shape)}")


def _check_factors(packed: Packed, old: Tensor) -> None:
    left, right = packed.parts[LEFT], packed.parts[RIGHT]
    matrices = all(one.dim() == 2 and one.dtype == torch.float32 for one in (left, right, old))
    fit = matrices and left.shape[1] == right.shape[0] and (left.shape[0], right.shape[1]) == tuple(old.shape)
    if not fit or left.shape[1] > min(old.shape):
        refuse(f"{LEFT} and {RIGHT} do not fit the base's {tuple(old.shape)} {old.dtype}")


def _is_list(packed: Packed, suffix: str) -> None:
    if packed.parts[suffix].dim() != 1:
        refuse(f"{suffix} are of shape {tuple(packed.parts[suffix].shape)}, no list")


def _places(present: set[str], prefix: str) -> str:
    """The one part that holds a mask."""
    found = sorted(present & {f"{prefix}bits", f"{prefix}gaps"})
    if len(found) != 1:
        refuse(f"{prefix}bits and {prefix}gaps are {'both there' if found else 'missing'}")
    return found[0]


def _check_places(packed: Packed, prefix: str, shape: torch.Size) -> None:
    """A mask's bytes: no more than a bit an entry, however they are coded."""
    bits, gaps = (packed.parts.get(f"{prefix}{kind}") for kind in ("bits", "gaps"))
    most = (shape[0], _bytes(shape[1]))
    if bits is not None and (bits.dtype != torch.uint8 or tuple(bits.shape) != most):
        refuse(f"{prefix}bits are {bits.dtype} of {tuple(bits.shape)}; {tuple(shape)} wants uint8 of {most}")
    if gaps is not None and (gaps.dtype not in ESCAPES or gaps.dim() != 1 or gaps.nbytes > most[0] * most[1]):
        refuse(f"{prefix}gaps are {gaps.dtype} of {tuple(gaps.shape)}, no places of {tuple(shape)}")


def _bytes(columns: int) -> int:
    return (columns + 7) // 8


def _all_of(present: set[str], needed: set[str]) -> None:
    """Refuse parts where one that is needed is missing, or another is there."""
    for suffix in sorted(needed - present):
        refuse(f"part {suffix} is missing")
    for suffix in sorted(present - needed):
        refuse(f"part {suffix} does not belong there")


def _fits(packed: Packed, shape: torch.Size) -> None:
    if packed.wanted is not None:
        if shape != packed.wanted:
            refuse(f"makes {tuple(shape)}, the model wants {tuple(packed.wanted)}")
        return
    known = MOST if packed.old is None else max(MOST, packed.old.numel())
    # A Size's own product overflows.
    if math.prod(shape) > known:
        refuse(f"makes {tuple(shape)}, more than {known:,} entries")
