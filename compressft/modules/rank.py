"""Which values are the largest: exact numbers whatever is equal, ties broken by position."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def nth_largest(values: Tensor, number: int) -> Tensor:
    """The `number`-th largest value (from 1) of a flat tensor, a scalar."""
    return _select(values, number)[0]


def nth_largest_each(values: Sequence[Tensor], numbers: Sequence[int]) -> list[tuple[Tensor, bool]]:
    """For each flat tensor its `number`-th largest value, and whether no smaller-ranked one equals it."""
    threads = torch.get_num_threads()
    if len(values) < 2 or threads < 2 or values[0].device.type != "cpu":
        return [_select(v, n) for v, n in zip(values, numbers, strict=True)]
    # NumPy selects on one thread and holds no lock meanwhile.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(_select, values, numbers))


@torch.no_grad()
def _select(values: Tensor, number: int) -> tuple[Tensor, bool]:
    dropped = values.numel() - number
    if values.device.type == "cpu":
        # NumPy selects with vector instructions: 15 times as fast as topk and kthvalue.
        wide = values if values.dtype in (torch.float32, torch.float64) else values.float()
        parted = np.partition(wide.numpy(), dropped)
        return values.new_tensor(float(parted[dropped])), dropped == 0 or bool(parted[:dropped].max() < parted[dropped])
    # Selecting from the shorter end; sorting all of a large model would take ten times as long.
    if number <= dropped:
        lowest = values.topk(number, sorted=False).values.amin()
    else:
        lowest = values.topk(dropped + 1, largest=False, sorted=False).values.amax()
    return lowest, int((values >= lowest).sum()) == number


def flatten(values: Sequence[Tensor]) -> Tensor:
    """All values in one flat tensor; a single contiguous one is not copied."""
    return values[0].reshape(-1) if len(values) == 1 else torch.cat([v.reshape(-1) for v in values])


def keep_largest(values: Sequence[Tensor], number: int) -> list[Tensor]:
    """Bool masks, shaped as `values`, of exactly the `number` largest over all of them; of equal ones, the first."""
    flat = flatten(values)
    if number <= 0 or number >= flat.numel():
        return [torch.full_like(v, number > 0, dtype=torch.bool) for v in values]
    lowest = nth_largest(flat, number)
    mask = flat >= lowest
    excess = int(mask.sum()) - number
    if excess:
        tied = torch.nonzero(flat == lowest).flatten()
        mask[tied[len(tied) - excess :]] = False
    parts = mask.split([v.numel() for v in values])
    return [part.view(v.shape) for part, v in zip(parts, values, strict=True)]


def keep_pattern(values: Tensor, n: int, m: int) -> Tensor:
    """Bool mask of the n largest of every m adjacent columns, (rows, columns); m must divide the columns."""
    groups = values.unflatten(-1, (-1, m))
    # Stable, so that equal values are kept in the same places on every machine.
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).flatten(-2)
