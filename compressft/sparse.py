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

from compressft.factors import find, multiply

VALUES, SHAPE, DROPPED, CHANGED, ROWS, COLUMNS = "#values", "#shape", "#dropped", "#changed", "#rows", "#columns"
SIGNS, STEPS, SCALE = "#signs", "#steps", "#scale"
LEFT, RIGHT, NUDGED = "#left", "#right", "#nudged"
PROBED = 8
# The highest code says: this many places on, and nothing is here.
ESCAPES = {torch.uint8: 255, torch.uint16: 65535}


def pack(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Replace each floating matrix that gets smaller by the parts of its smallest form (see above).

    Args:
        base: tensors that a reader will have, by the same names.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        forms = [{name: tensor}]
        if tensor.dim() == 2 and tensor.is_floating_point():
            forms.append(_pruned(name, tensor))
            old = (base or {}).get(name)
            if old is not None and old.dim() == 2 and old.dtype == tensor.dtype:
                same = old.shape == tensor.shape
                forms += _against(name, tensor, old) if same else _selected(name, tensor, old)
        packed |= min(forms, key=stored_bytes)
    return packed


def unpack(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Undo `pack`, to the bit (a negative zero comes back as zero); `base` as it was given there."""
    base = base or {}
    found = {name: tensor for name, tensor in tensors.items() if "#" not in name}
    for name in dict.fromkeys(key.partition("#")[0] for key in tensors if "#" in key):
        if name + VALUES in tensors:
            values, shape = tensors[name + VALUES], torch.Size(tensors[name + SHAPE].tolist())
            new = torch.zeros(shape, dtype=values.dtype)
            new[_load(tensors, name + "#", shape)] = values
        elif name + ROWS in tensors:
            new = base[name][tensors[name + ROWS]]
        elif name + COLUMNS in tensors:
            new = base[name][:, tensors[name + COLUMNS]]
        else:
            old = base[name]
            if name + SCALE in tensors:
                new = old + _integers(tensors, name, old) * tensors[name + SCALE]
            elif name + LEFT in tensors:
                new = old + multiply(tensors[name + LEFT], tensors[name + RIGHT])
            else:
                new = old.masked_fill(_load(tensors, f"{name}{DROPPED}_", old.shape), 0.0)
            if name + CHANGED in tensors:
                new[_load(tensors, f"{name}{CHANGED}_", new.shape)] = tensors[name + CHANGED]
            if name + NUDGED in tensors:
                places = _load(tensors, f"{name}{NUDGED}_", new.shape)
                new[places] = (new[places].view(torch.int32) + tensors[name + NUDGED]).view(torch.float32)
        found[name] = new.contiguous()
    return found


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
    """The mask that `pack_places` packed, bool, in its shape (rows, columns)."""
    if places.dim() == 2:
        return unpack_mask(places, shape[1])
    full = ESCAPES[places.dtype]
    codes = places.to(torch.int64)
    here = codes != full
    ends = torch.where(here, codes + 1, full).cumsum(0) - 1
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=places.device)
    mask[ends[here]] = True
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


def _load(tensors: Mapping[str, Tensor], prefix: str, shape: torch.Size) -> Tensor:
    """The mask stored under a prefix; all False where there is none."""
    for suffix in ("bits", "gaps"):
        if prefix + suffix in tensors:
            return unpack_places(tensors[prefix + suffix], shape)
    return torch.zeros(shape, dtype=torch.bool)


def _pruned(name: str, tensor: Tensor) -> dict[str, Tensor]:
    mask = tensor != 0
    # Neither the columns nor the rows can be told from the places.
    return {**_store(name + "#", mask), name + VALUES: tensor[mask], name + SHAPE: torch.tensor(tensor.shape)}


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
                if stored_bytes(_stepped(name, some, before, most, dim)) < some.nbytes / 2:
                    forms.append(_stepped(name, tensor, old, most, dim))
        factors = find(tensor, old)
        if factors is not None:
            left, right = factors
            corrected = _corrected(name, tensor, old + multiply(left, right))
            forms.append({name + LEFT: left, name + RIGHT: right, **corrected})
    return forms


def _corrected(name: str, tensor: Tensor, close: Tensor, always: bool = False) -> dict[str, Tensor]:
    """The parts that make a tensor of a close one; none where nothing differs, unless `always`."""
    wrong = tensor != close
    if not (always or wrong.any()):
        return {}
    parts: dict[str, Tensor] = {}
    if tensor.dtype == torch.float32:
        # The bits of floats of one sign count them.
        further = tensor.view(torch.int32).long() - close.view(torch.int32)
        near = wrong & (further.abs() <= 127)
        if near.any():
            parts = {**_store(f"{name}{NUDGED}_", near), name + NUDGED: further[near].to(torch.int8)}
            wrong = wrong & ~near
            if not wrong.any():
                return parts
    return {**parts, **_store(f"{name}{CHANGED}_", wrong), name + CHANGED: tensor[wrong]}


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
        integers = {name + SIGNS: pack_mask(moved > 0)}
    else:
        integers = {name + STEPS: (count * moved.sign()).nan_to_num(0.0).clamp(-most, most).to(torch.int8)}
    factors = _integers(integers, name, old)
    # Ends of the interval may lie on floats; which of them round the right way only trying tells.
    scales = [middle, *(torch.nextafter(middle, torch.full_like(middle, end)) for end in (-torch.inf, torch.inf))]
    wrong = torch.stack([(old + factors * scale != tensor).sum(dim, keepdim=True) for scale in scales])
    scale = torch.stack(scales).gather(0, wrong.argmin(0, keepdim=True))[0]
    return {**integers, name + SCALE: scale, **_corrected(name, tensor, old + factors * scale)}


def _integers(tensors: Mapping[str, Tensor], name: str, old: Tensor) -> Tensor:
    if name + STEPS in tensors:
        return tensors[name + STEPS].to(old.dtype)
    return unpack_mask(tensors[name + SIGNS], old.shape[1]).to(old.dtype) * 2 - 1


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
