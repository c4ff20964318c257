"""Tensors in files, each in its smallest exact form: dense, pruned, or by how it differs from a base.

Storage alone: nothing gets faster. What a form is chosen by is the content, whoever made it. A name without a suffix is
the tensor itself; the others are told by the suffixes behind its name:

- `#bits` or `#gaps`, `#values`, `#shape`: zero but for `values` at these places;
- `#dropped_bits` or `#dropped_gaps`: the base's values, zero at these places;
- `#changed_bits` or `#changed_gaps`, `#changed`: the base's values (zero where dropped), but `changed` at these places;
- `#signs` or `#steps`, `#scale`: the base and one bit (+1 or -1) or integer an entry times a scale a row or column,
  `changed` where that is not it to the bit;
- `#left`, `#right`: the base and the product of two factors, `changed` likewise;
- `#nudged_bits` or `#nudged_gaps`, `#nudged`: as `changed`, where fp32 values lie close: how many floats further;
- `#rows` or `#columns`: these rows or columns of the base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressft_kernels import pack_mask, unpack_mask
from torch import Tensor

from compressft.errors import UserError
from compressft.model.saved.factors import find, multiply
from compressft.model.saved.parts import (
    CHANGED,
    COLUMNS,
    DROPPED,
    ESCAPES,
    LEFT,
    NUDGED,
    RIGHT,
    ROWS,
    SCALE,
    SHAPE,
    SIGNS,
    STEPS,
    VALUES,
    Packed,
    check_parts,
    refuse,
)

PROBED = 8
ROWS_AT_ONCE = 1024


def pack(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Replace each floating matrix that gets smaller by the parts of its smallest form (see above).

    Args:
        base: tensors that a reader will have, by the same names.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        forms = [{name: tensor}]
        if tensor.dim() == 2 and tensor.is_floating_point():
            if not _too_many(int(tensor.count_nonzero()), tensor):
                forms.append(_pruned(name, tensor))
            old = (base or {}).get(name)
            if old is not None and old.dim() == 2 and old.dtype == tensor.dtype:
                same = old.shape == tensor.shape
                forms += _against(name, tensor, old) if same else _selected(name, tensor, old)
        packed |= min(forms, key=stored_bytes)
    return packed


def unpack(
    tensors: Mapping[str, Tensor],
    base: Mapping[str, Tensor] | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
    where: str = "packed tensors",
) -> dict[str, Tensor]:
    """Undo `pack`, to the bit (a negative zero comes back as zero); `base` as it was given there.

    Nothing is allocated before it is known to fit.

    Args:
        shapes: of the tensors that a reader needs; None where only the base says what is too large.
        where: begins the messages, such as the file's name.

    Raises:
        UserError: a part is missing, unknown or not what its form wants, or the tensor is not one that is needed.
    """
    base = base or {}
    found = {name: tensor for name, tensor in tensors.items() if "#" not in name}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, mark, suffix = key.partition("#")
        if mark:
            parts.setdefault(name, {})[mark + suffix] = tensor
    for name, own in parts.items():
        try:
            if name in found:
                refuse("is there whole and in parts")
            if shapes is not None and name not in shapes:
                refuse("has no place in the model")
            packed = Packed(own, base.get(name), None if shapes is None else shapes[name])
            check_parts(packed)
            found[name] = _unpacked(packed).contiguous()
        except UserError as error:
            raise UserError(f"{where}: tensor {name!r}: {error}; restore the file") from None
    return found


def _unpacked(packed: Packed) -> Tensor:
    """The tensor of checked parts."""
    parts = packed.parts
    if VALUES in parts:
        new = torch.zeros(packed.shape, dtype=parts[VALUES].dtype)
        return _put(new, parts, "#", parts[VALUES])
    old = packed.old
    assert old is not None
    if ROWS in parts:
        return old[parts[ROWS].long()]
    if COLUMNS in parts:
        return old[:, parts[COLUMNS].long()]
    if SCALE in parts:
        new = old + _integers(parts, old) * parts[SCALE]
    elif LEFT in parts:
        new = old + multiply(parts[LEFT], parts[RIGHT])
    else:
        new = old.masked_fill(_load(parts, f"{DROPPED}_", old.shape), 0.0)
    if CHANGED in parts:
        new = _put(new, parts, f"{CHANGED}_", parts[CHANGED])
    if NUDGED in parts:
        places = _load(parts, f"{NUDGED}_", new.shape, parts[NUDGED])
        new[places] = (new[places].view(torch.int32) + parts[NUDGED]).view(torch.float32)
    return new


def _put(new: Tensor, parts: Mapping[str, Tensor], prefix: str, values: Tensor) -> Tensor:
    new[_load(parts, prefix, new.shape, values)] = values
    return new


def stored_bytes(parts: Mapping[str, Tensor]) -> int:
    """Bytes of a form's values; names and shapes are left out."""
    return sum(tensor.nbytes for name, tensor in parts.items() if not name.endswith(SHAPE))


def pack_places(mask: Tensor) -> Tensor:
    """Where a mask is True, in the fewest bytes.

    Args:
        mask: (rows, columns) bool.

    Returns:
        bits (rows, ceil(columns / 8)) uint8, or the distances (n,) uint8 or uint16 from one True to the next, row after
        row: code c is c places in between, the dtype's highest code is that many places and no True behind them.
    """
    bits = pack_mask(mask)
    if int(mask.sum()) >= bits.numel():
        return bits
    between = torch.diff(mask.flatten().nonzero().flatten(), prepend=torch.tensor([-1], device=mask.device)) - 1
    return min(bits, *(_escaped(between, dtype) for dtype in ESCAPES), key=lambda t: t.nbytes)


def unpack_places(places: Tensor, shape: torch.Size) -> Tensor:
    """The mask that `pack_places` packed, bool, in its shape (rows, columns).

    Raises:
        UserError: a place is beyond the shape.
    """
    if places.dim() == 2:
        return unpack_mask(places, shape[1])
    full = ESCAPES[places.dtype]
    codes = places.to(torch.int64)
    here = codes != full
    ends = torch.where(here, codes + 1, full).cumsum(0)[here] - 1
    if len(ends) and int(ends[-1]) >= shape.numel():
        refuse(f"a place is beyond its shape {tuple(shape)}")
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=places.device)
    mask[ends] = True
    return mask.view(shape)


def _escaped(between: Tensor, dtype: torch.dtype) -> Tensor:
    full = ESCAPES[dtype]
    ends = (between // full + 1).cumsum(0)
    codes = torch.full((int(ends[-1]) if len(ends) else 0,), full, device=between.device)
    codes[ends - 1] = between % full
    return codes.to(dtype)


def _store(prefix: str, mask: Tensor) -> dict[str, Tensor]:
    places = pack_places(mask)
    return {prefix + ("bits" if places.dim() == 2 else "gaps"): places}


def _load(parts: Mapping[str, Tensor], prefix: str, shape: torch.Size, values: Tensor | None = None) -> Tensor:
    """The mask stored under a prefix, as many places as there are values; all False where there is none."""
    places = next((parts[prefix + kind] for kind in ("bits", "gaps") if prefix + kind in parts), None)
    mask = torch.zeros(shape, dtype=torch.bool) if places is None else unpack_places(places, shape)
    if values is not None and int(mask.sum()) != len(values):
        refuse(f"has {int(mask.sum())} places for {len(values)} values")
    return mask


def _too_many(entries: int, tensor: Tensor) -> bool:
    """Whether so many entries and their places take no less than the tensor itself."""
    places = tensor.shape[0] * -(-tensor.shape[1] // 8)
    return entries * tensor.element_size() + places >= tensor.nbytes


def _at(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor[mask] by parts: the whole would take an index of 16 bytes an entry."""
    return torch.cat(
        [values[here] for values, here in zip(*(one.split(ROWS_AT_ONCE) for one in (tensor, mask)), strict=True)]
    )


def _pruned(name: str, tensor: Tensor) -> dict[str, Tensor]:
    mask = tensor != 0
    # Neither the columns nor the rows can be told from the places.
    return {**_store(name + "#", mask), name + VALUES: _at(tensor, mask), name + SHAPE: torch.tensor(tensor.shape)}


def _against(name: str, tensor: Tensor, old: Tensor) -> list[dict[str, Tensor]]:
    """The forms of a tensor that has the base's shape."""
    dropped = (tensor == 0) & (old != 0)
    parts = _store(f"{name}{DROPPED}_", dropped) if dropped.any() else {}
    forms = [{**parts, **_corrected(name, tensor, old.masked_fill(dropped, 0.0), always=not parts)}]
    if tensor.dtype == torch.float32:
        for dim in (1, 0):
            # A few lines tell whether there is anything to find: most tensors have been trained freely.
            lines = (tensor != old).any(dim).nonzero().flatten()[:PROBED]
            some, before = tensor.index_select(1 - dim, lines), old.index_select(1 - dim, lines)
            for most in (1, 127):
                plain = stored_bytes(_corrected(name, some, before))
                if stored_bytes(_stepped(name, some, before, most, dim)) < min(some.nbytes / 2, plain):
                    forms.append(_stepped(name, tensor, old, most, dim))
        factors = find(tensor, old)
        if factors is not None:
            left, right = factors
            corrected = _corrected(name, tensor, old + multiply(left, right))
            forms.append({name + LEFT: left, name + RIGHT: right, **corrected})
    return forms


def _corrected(name: str, tensor: Tensor, close: Tensor, always: bool = False) -> dict[str, Tensor]:
    """The parts that make a tensor of a close one; none where nothing differs, unless `always`.

    The tensor itself where that is no more: no form that has it among its parts is the smallest.
    """
    wrong = tensor != close
    if not (always or wrong.any()):
        return {}
    parts: dict[str, Tensor] = {}
    if tensor.dtype == torch.float32:
        # The bits of floats of one sign count them; of two signs their difference may not fit.
        further = tensor.view(torch.int32) - close.view(torch.int32)
        near = wrong & (tensor.signbit() == close.signbit()) & (further.abs() <= 127)
        if near.any():
            parts = {**_store(f"{name}{NUDGED}_", near), name + NUDGED: _at(further, near).to(torch.int8)}
            wrong = wrong & ~near
            if not wrong.any():
                return parts
    if _too_many(int(wrong.sum()), tensor):
        return {name: tensor}
    return {**parts, **_store(f"{name}{CHANGED}_", wrong), name + CHANGED: _at(tensor, wrong)}


def _stepped(name: str, tensor: Tensor, old: Tensor, most: int, dim: int) -> dict[str, Tensor]:
    """The base and integers up to `most` times a scale for what lies along `dim`.

    Adding rounds, so that a scale is known by the interval that every entry leaves it: the middle of what they share.
    """
    moved = tensor.double() - old.double()
    size = moved.abs()
    slack = (torch.nextafter(tensor.abs(), tensor.new_tensor(torch.inf)) - tensor.abs()).double() / 2
    largest = size.amax(dim, keepdim=True)
    if most == 1:
        count = torch.ones_like(size)
    else:
        count = (size / (largest / most).clamp(min=torch.finfo(torch.float64).tiny)).round()
    high = torch.where(count > 0, (size + slack) / count, torch.inf).amin(dim, keepdim=True)
    low = torch.where(count > 0, (size - slack) / count, -torch.inf).amax(dim, keepdim=True)
    middle = torch.where(largest > 0, (low + high) / 2, 0.0).float().nan_to_num(0.0, 0.0, 0.0)
    if most == 1:
        integers = {SIGNS: pack_mask(moved > 0)}
    else:
        integers = {STEPS: (count * moved.sign()).nan_to_num(0.0).clamp(-most, most).to(torch.int8)}
    factors = _integers(integers, old)
    # Ends of the interval may lie on floats; which of them round the right way only trying tells.
    scales = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-torch.inf, torch.inf))]
    wrong = torch.stack([(old + factors * scale != tensor).sum(dim, keepdim=True) for scale in scales])
    scale = torch.stack(scales).gather(0, wrong.argmin(0, keepdim=True))[0]
    stored = {name + suffix: tensor for suffix, tensor in integers.items()}
    return {**stored, name + SCALE: scale, **_corrected(name, tensor, old + factors * scale)}


def _integers(parts: Mapping[str, Tensor], old: Tensor) -> Tensor:
    if STEPS in parts:
        return parts[STEPS].to(old.dtype)
    return unpack_mask(parts[SIGNS], old.shape[1]).to(old.dtype) * 2 - 1


def _selected(name: str, tensor: Tensor, old: Tensor) -> list[dict[str, Tensor]]:
    """The form "rows or columns of the base", where the tensor consists of such."""
    for suffix, dim in ((ROWS, 0), (COLUMNS, 1)):
        if tensor.shape[1 - dim] == old.shape[1 - dim]:
            # Of equal rows any will do.
            known = {row: place for place, row in enumerate(_rows(old, dim))}
            places = [known.get(row) for row in _rows(tensor, dim)]
            if None not in places:
                return [{name + suffix: torch.tensor(places, dtype=torch.int32)}]
    return []


def _rows(tensor: Tensor, dim: int) -> list[bytes]:
    rows = (tensor if dim == 0 else tensor.t()).contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]
